"""Nobody but the user, and no accident, puts code into the process: whose a cache may be, what a library must be to be
loaded, and disks that are full, read-only or lie. A script stands in for the compiler (builds.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builds import Compiler, fresh

from diffkern import toolchain

ANOTHER = 54321  # a user who is not this one
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_cache_is_made_private_whatever_the_mask(home, loaded, compiler, mask):
    before = os.umask(mask)
    try:
        assert fresh().why_not("cpu") is None
    finally:
        os.umask(before)
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_library_in_a_folder_that_others_can_write_to_is_not_loaded(home, loaded, compiler, capsys, mode):
    assert fresh().why_not("cpu") is None
    home.chmod(mode)
    assert fresh().why_not("cpu") is None
    assert compiler.builds == 2
    assert not loaded[1].is_relative_to(home)
    expected = f"others can write to the cache {home}: make it private (chmod go-w) or remove it; trying "
    assert expected in capsys.readouterr().err
    home.chmod(0o700)
    assert fresh().why_not("cpu") is None
    assert loaded[2] == loaded[0]


@as_root
@pytest.mark.parametrize("what", ["folder", "entry", "library", "record"])
def test_what_another_user_owns_is_not_loaded(home, loaded, compiler, capsys, what):
    assert fresh().why_not("cpu") is None
    library = loaded[0]
    places = {"folder": home, "entry": library.parent, "library": library, "record": library.with_suffix(".json")}
    os.chown(places[what], ANOTHER, -1)
    assert fresh().why_not("cpu") is None
    assert not loaded[1].is_relative_to(home)
    assert f"{places[what]} belongs to another user" in capsys.readouterr().err


@as_root
def test_with_no_cache_of_ones_own_the_reason_says_whose_they_are(home, loaded, compiler, tmp_path):
    fallback = tmp_path / "tmp" / f"diffkern-{os.getuid()}"
    for folder in (home, fallback):
        folder.mkdir(parents=True)
        os.chown(folder, ANOTHER, -1)
    reason = fresh().why_not("cpu")
    assert f"{home} belongs to another user" in reason
    assert f"{fallback} belongs to another user" in reason
    assert (loaded, compiler.builds) == ([], 0)


def test_one_byte_of_the_same_age_and_size_is_noticed(home, loaded, compiler):
    assert fresh().why_not("cpu") is None
    before = loaded[0].stat()
    loaded[0].write_bytes(b"L" + loaded[0].read_bytes()[1:])
    os.utime(loaded[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fresh().why_not("cpu") is None
    assert compiler.builds == 2
    assert loaded[1].read_text() == "library\n"


@pytest.mark.parametrize("when", [0.0, 4e9], ids=["1970", "2096"])
def test_the_clock_may_jump(home, loaded, compiler, monkeypatch, tmp_path, when):
    """Neither a build nor a library depends on how old a file is."""
    copied = shutil.copytree(toolchain.sources(), tmp_path / "csrc")
    monkeypatch.setattr(toolchain, "sources", lambda: copied)
    assert fresh().why_not("cpu") is None
    for path in (*copied.rglob("*"), *home.rglob("*"), home):
        os.utime(path, (when, when))
    assert fresh().why_not("cpu") is None
    assert compiler.builds == 1
    (copied / "cpu" / "randn.cpp").write_text("// other sources\n")
    os.utime(copied / "cpu" / "randn.cpp", (when, when))
    monkeypatch.setattr("time.monotonic", iter([100.0, 50.0]).__next__)  # what cannot be, and must not matter
    assert fresh().why_not("cpu") is None
    assert compiler.builds == 2


def test_a_disk_that_lies_is_found_out(home, loaded, compiler, monkeypatch):
    plain = shutil.copyfile

    def copyfile(source, target):
        plain(source, target)
        if target.name == "diffkern_cpu.so":
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    reason = fresh().why_not("cpu")
    assert reason.count("does not give back what was written to it") == 2  # of the cache and the temporary folder
    assert not loaded
    assert not [path for path in home.iterdir() if path.is_dir()]


def test_a_full_disk_is_left_for_the_temporary_folder(home, loaded, tmp_path, tmpfs, monkeypatch, capsys):
    compiler = Compiler(tmp_path, link='head -c 100000 /dev/zero > "$out"')
    monkeypatch.setenv("CXX", str(compiler.path))
    monkeypatch.setenv("DIFFKERN_CACHE", str(tmpfs))
    assert fresh().why_not("cpu") is None
    assert loaded[0].is_relative_to(tmp_path / "tmp")
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in tmpfs.iterdir() if path.is_dir()], "nothing half-written stays"
    monkeypatch.setattr("tempfile.tempdir", str(tmpfs))  # and where that is as full, it is the reason
    assert "No space left on device" in fresh().why_not("cpu")
    assert len(loaded) == 1


def test_a_read_only_cache_is_read_and_not_written(home, loaded, compiler, tmpfs, monkeypatch, capsys):
    monkeypatch.setenv("DIFFKERN_CACHE", str(tmpfs))
    assert fresh().why_not("cpu") is None
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    assert fresh().why_not("cpu") is None
    assert loaded[0] == loaded[1]
    monkeypatch.setattr(toolchain, "level_flags", lambda level: "-O0")  # another library
    assert fresh().why_not("cpu") is None
    assert not loaded[2].is_relative_to(tmpfs)
    assert "Read-only file system" in capsys.readouterr().err
    assert compiler.builds == 2


BUILD = "import sys; from builds import fresh; sys.exit(fresh().why_not('cpu') is not None)"


def test_what_a_killed_build_leaves_is_removed(home, loaded, compiler, tmp_path, monkeypatch):
    slow = Compiler(tmp_path, link='echo > "$0.links"; sleep 60')
    environment = {**os.environ, "CXX": str(slow.path), "DIFFKERN_CACHE": str(home)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", BUILD], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not Path(f"{slow.path}.links").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [path for path in home.iterdir() if path.name.startswith("building-")]
    Compiler(tmp_path)  # the same compiler, which now is quick
    assert fresh().why_not("cpu") is None
    assert sorted(path.suffix for path in home.iterdir()) == ["", ".lock", ".log"]
    assert json.loads(toolchain.record_of(loaded[0]).read_text())["sha256"] == toolchain.hash_of(b"library\n")

"""The loader of the native library: every way in which a cache, a compiler or a home can fail. A script stands in for
the compiler, so that a build takes no time; that the real one works, the rest of the suite shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import timeit
from pathlib import Path

import pytest
import torch
from builds import Compiler, fresh

import diffkern.native
from diffkern import toolchain
from diffkern.available import availability


def test_builds_once_into_a_private_folder(home, loaded, compiler, capsys):
    assert fresh().why_not("cpu") is None
    assert fresh().why_not("cpu") is None
    assert compiler.builds == 1
    assert loaded[0] == loaded[1]
    assert loaded[0].is_relative_to(home)
    assert home.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.count("diffkern: building the cpu library, once (about") == 1
    assert sorted(f.name for f in loaded[0].parent.iterdir()) == ["diffkern_cpu.json", "diffkern_cpu.so"]


def test_cache_folder_is_chosen_by_the_environment(home, loaded, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fresh().why_not("cpu") is None
    monkeypatch.setenv("DIFFKERN_CACHE", str(tmp_path / "chosen"))
    assert fresh().why_not("cpu") is None
    assert loaded[0].is_relative_to(tmp_path / "xdg" / "diffkern")
    assert loaded[1].is_relative_to(tmp_path / "chosen")


@pytest.mark.parametrize("what", ["sources", "torch", "compiler", "flags"])
def test_everything_that_matters_names_another_library(home, loaded, compiler, monkeypatch, what):
    assert fresh().why_not("cpu") is None
    native = fresh()
    if what == "sources":
        monkeypatch.setattr(toolchain, "source_hash", lambda library: "other")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif what == "compiler":
        compiler.path.write_text(compiler.path.read_text().replace("1.0", "1.1"))
    else:
        monkeypatch.setattr(toolchain, "level_flags", lambda level: "-O0")
    assert native.why_not("cpu") is None
    assert compiler.builds == 2
    assert loaded[0] != loaded[1]


def truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:3])


def forge_the_record(library: Path) -> None:
    record = library.with_suffix(".json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "0" * 64}))


def break_the_record(library: Path) -> None:
    library.with_suffix(".json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, forge_the_record, break_the_record, Path.unlink])
def test_a_broken_cache_file_is_built_again(home, loaded, compiler, damage):
    assert fresh().why_not("cpu") is None
    damage(loaded[0])
    assert fresh().why_not("cpu") is None
    assert compiler.builds == 2
    assert loaded[1].read_text() == "library\n"


def test_without_a_home_it_builds_in_the_temporary_folder(home, loaded, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nobody")  # where not even root can write
    assert fresh().why_not("cpu") is None
    assert fresh().why_not("cpu") is None
    assert compiler.builds == 1
    assert loaded[0].is_relative_to(tmp_path / "tmp" / f"diffkern-{os.getuid()}")


def test_a_folder_that_others_can_write_to_is_not_used(home, loaded, compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nobody")
    shared = tmp_path / "tmp" / f"diffkern-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    reason = fresh().why_not("cpu")
    assert "no cache can be written" in reason
    assert "/proc/nobody" in reason
    assert "others can write to the cache" in reason
    assert not loaded


def test_a_missing_compiler_is_the_reason(home, loaded, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "there is no C++ compiler" in fresh().why_not("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in fresh().why_not("cpu")
    assert not loaded


def test_building_can_be_forbidden(home, loaded, compiler, monkeypatch):
    monkeypatch.setenv("DIFFKERN_NO_BUILD", "1")
    assert "DIFFKERN_NO_BUILD" in fresh().why_not("cpu")
    assert compiler.builds == 0


def test_a_failed_build_says_why_and_is_not_tried_again(home, loaded, tmp_path, monkeypatch):
    compiler = Compiler(tmp_path, compile='echo once >> "$0.tries"; echo "a.cpp:3:1: error: no such luck"; exit 1')
    monkeypatch.setenv("CXX", str(compiler.path))
    native = fresh()
    reason = native.why_not("cpu")
    assert "a.cpp:3:1: error: no such luck" in reason
    log = Path(reason.split("(log: ")[1].rstrip(")"))
    assert "no such luck" in log.read_text()
    tries = Path(f"{compiler.path}.tries").read_text()
    assert native.why_not("cpu") == reason
    assert Path(f"{compiler.path}.tries").read_text() == tries
    assert not [f for f in home.iterdir() if f.is_dir()], "nothing half-built stays"


def test_a_library_that_does_not_load_is_the_reason(home, compiler):
    assert "the cpu library" in fresh().why_not("cpu")  # "library" is not a shared object


def test_threads_build_once(home, loaded, tmp_path, monkeypatch):
    compiler = Compiler(tmp_path, link='sleep 0.3; echo library > "$out"')
    monkeypatch.setenv("CXX", str(compiler.path))
    native, reasons = fresh(), []
    threads = [threading.Thread(target=lambda: reasons.append(native.why_not("cpu"))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert reasons == [None] * 4
    assert (compiler.builds, len(loaded)) == (1, 1)


FLAGS = {
    "x86-64-v4-bf16": "avx512_bf16 avx512_vnni",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
}


def test_level_is_one_that_the_cpu_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    text = tmp_path / "cpuinfo"
    below = ["x86-64-v2", "x86-64"]
    v4 = "x86-64-v2 x86-64-v3 x86-64-v4"
    for flags, expected in (
        ("x86-64-v2", below),
        ("x86-64-v2 x86-64-v3", ["x86-64-v3", *below]),
        (v4, ["x86-64-v4", "x86-64-v3", *below]),
        (f"{v4} x86-64-v4-bf16", ["x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", *below]),
        ("x86-64-v4", ["x86-64"]),  # a level without the one below it does not count
    ):
        text.write_text("processor : 0\nflags : fpu " + " ".join(FLAGS[f] for f in flags.split()) + "\n")
        assert toolchain.levels(text) == expected
    assert toolchain.levels(tmp_path / "nothing") == ["x86-64"]


def test_a_library_from_the_wheel_comes_first(home, loaded, compiler, tmp_path, monkeypatch):
    native = fresh()
    native._PACKAGE = tmp_path / "package"
    monkeypatch.setattr(toolchain, "levels", lambda: ["better", "good"])
    made = toolchain.ahead_of_time_path(native._PACKAGE, "good")
    made.parent.mkdir(parents=True)
    made.write_text("from the wheel")
    toolchain.write_record(made, "cpu")
    assert native.why_not("cpu") is None
    assert (loaded, compiler.builds) == ([made], 0)


def test_a_stale_library_from_the_wheel_is_not_loaded(home, loaded, compiler, tmp_path):
    native = fresh()
    native._PACKAGE = tmp_path / "package"
    made = toolchain.ahead_of_time_path(native._PACKAGE, toolchain.levels()[0])
    made.parent.mkdir(parents=True)
    made.write_text("from the wheel")
    made.with_suffix(".json").write_text('{"sha256": "of something else"}')
    assert native.why_not("cpu") is None
    assert loaded[0] != made
    assert compiler.builds == 1


def test_asking_again_is_free():
    diffkern.native.why_not("cpu")
    assert min(timeit.repeat(lambda: diffkern.native.why_not("cpu"), number=10_000, repeat=5)) / 10_000 < 1e-6


def test_needs_only_the_stable_abi():
    if (reason := availability("cpu")) is not None:
        pytest.skip(reason)
    library = next(path for path in torch.ops.loaded_libraries if "diffkern_cpu" in path)
    needed = subprocess.run(["nm", "-DCu", library], capture_output=True, text=True, check=True).stdout
    assert "torch_parallel_for" in needed
    assert not [line for line in needed.splitlines() if "c10::" in line or "at::" in line]


DRAW = """
import diffkern
keys = diffkern.noise_keys(0, 2)
print({c.backend: c.reason for c in diffkern.explain("randn", keys, [3])}["cpu"])
print(diffkern.randn(keys, [3]).tolist())
try:
    with diffkern.use_backend("cpu"):
        diffkern.randn(keys, [3])
except diffkern.BackendError as error:
    print("forced:", error)
"""


def python(**environment: str) -> subprocess.Popen[str]:
    root = str(Path(diffkern.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", DRAW],
        env={**os.environ, "PYTHONPATH": root, "DIFFKERN_NO_BUILD": "0", "DIFFKERN_BACKEND": "auto", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_start_together_build_once(tmp_path):
    if (reason := availability("cpu")) is not None:
        pytest.skip(reason)
    real = next(path for path in torch.ops.loaded_libraries if "diffkern_cpu" in path)
    compiler = Compiler(tmp_path, link=f'sleep 2; cp "{real}" "$out"')
    both = [python(CXX=str(compiler.path), DIFFKERN_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    results = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert "first that can run" in results[0][0]
    assert compiler.builds == 1


def test_the_reference_works_without_a_compiler(tmp_path):
    p = python(CXX="no-such-compiler", DIFFKERN_CACHE=str(tmp_path))
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    reason, values, forced = out.splitlines()
    assert "no-such-compiler" in reason
    expected = diffkern.ops.randn.reference(diffkern.noise_keys(0, 2), [3]).tolist()
    assert values == str(expected)
    assert "'cpu' was forced but the cpu library: there is no compiler" in forced

"""How a job ends that cannot go on: wrong input, a disk that is full or cannot be written, another job, a signal.
Nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import tempfile

import numpy as np
import pytest
from PIL import Image
from sentences import expect_a_sentence
from shards import SHARDS, contents
from signals import InCalls

import diffkern
from diffkern.models.unet import UNet2D

WRONG = {
    ("--format", "jpg"): "no format is named 'jpg': choose one of npz, png, tar",
    ("--shard-size", "0"): "--shard-size must be at least 1, not 0",
    ("-n", "0"): "-n must be at least 1, not 0",
    ("--guidance", "nan"): "finite",
}


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_input_writes_nothing(make, args, capsys):
    expect_a_sentence(lambda: make(*args), WRONG[args], capsys)


def test_wrong_arguments_are_refused_before_anything_is_drawn(tiny, tmp_path):
    table = diffkern.make_table("ddim", tiny.schedule, 2)
    for wrong, message in (
        ({"n": 0}, "n must be at least 1"),
        ({"labels": []}, "one label or several"),
        ({"guidance": 2.0}, "guidance needs labels"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"out": tmp_path / "out", "shard_size": 0}, "shard_size must be at least 1"),
        ({"out": tmp_path / "out", "format": "jpg"}, "no format is named 'jpg'"),
    ):
        with pytest.raises(ValueError, match=message):
            diffkern.sample_dataset(tiny.model, table, **{"n": 4, **wrong})
    assert not (tmp_path / "out").exists()


def test_latents_are_no_pictures(tmp_path):
    table = diffkern.make_table("ddim", diffkern.load("emoji-32").schedule, 1)

    def latents(x, t):
        return x

    def write(**more):
        return diffkern.sample_dataset(latents, table, 2, shape=(4, 2, 2), out=tmp_path / "out", **more)

    with pytest.raises(ValueError, match="4 channels is no png: give npz, or decode"):
        write(format="png")
    shutil.rmtree(tmp_path / "out")
    assert write(format="png", decode=lambda x: x[:, :3]).shards == 1
    assert np.asarray(Image.open(tmp_path / "out/00000001.png")).shape == (2, 2, 3)


def test_a_full_disk_leaves_whole_shards_and_one_sentence(make, monkeypatch, capsys):
    assert make("--out", "alone") == 0
    writes, fsync = [], os.fsync

    def full(handle):
        writes.append(handle)
        if len(writes) == 4:  # the manifest, a shard and its .json before
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    message = "cannot write out: No space left on device; out keeps 1 of 3 shards"
    expect_a_sentence(make, message, capsys, ["alone", "out"])
    assert sorted(contents()) == ["manifest.json", f"{SHARDS[0]}.json", f"{SHARDS[0]}.npz"]
    assert make() == 0
    assert contents() == contents("alone")


def test_a_read_only_place_is_refused_at_once(make, monkeypatch, capsys):
    def refuse(**kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    expect_a_sentence(make, "cannot write out: Read-only file system", capsys)


def test_a_disk_that_is_full_or_read_only_is_said_and_the_job_goes_on_once_it_is_not(make, tmpfs, capsys):
    assert make("--out", "alone") == 0
    out = tmpfs / "out"
    out.mkdir()
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.statvfs(tmpfs).f_bavail * os.statvfs(tmpfs).f_frsize // page
    (tmpfs / "filler").write_bytes(bytes((free - 3) * page))  # a page each for the manifest, a shard and its .json
    message = f"No space left on device; {out} keeps 1 of 3 shards"
    expect_a_sentence(lambda: make("--out", out), message, capsys, ["alone"])
    assert sorted(contents(out)) == ["manifest.json", f"{SHARDS[0]}.json", f"{SHARDS[0]}.npz"], "nothing half-written"
    (tmpfs / "filler").unlink()

    def mount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(tmpfs)], check=True)

    mount("ro")
    expect_a_sentence(lambda: make("--out", out), f"cannot write {out}: Read-only file system", capsys, ["alone"])
    mount("rw")
    assert make("--out", out) == 0
    assert contents(out) == contents("alone")


def test_a_folder_takes_one_job_at_a_time(make, monkeypatch, capsys):
    assert make("--out", "alone") == 0
    second: list[list[str] | None] = []
    forward = UNet2D.forward

    def meanwhile(self, *args, **kwargs):
        if len(args[0]) and not second:
            second.append(None)
            message = "another job is writing to out: wait for its end"
            expect_a_sentence(make, message, capsys, ["alone", "out"])
            second.append(sorted(contents()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2D, "forward", meanwhile)
    assert make() == 0
    assert second[1] == ["manifest.json"], "it wrote nothing into the folder of the first"
    assert contents() == contents("alone")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_it_after_the_shard_the_second_at_once(make, monkeypatch, capsys, number, code):
    assert make("--out", "alone") == 0
    calls = InCalls(monkeypatch, number)
    calls.choose(5, 6)  # a shard takes 4 calls, 2 of each of its 2 batches
    assert make() == code
    assert capsys.readouterr().err == (
        "diffkern sample: stopping after this shard; again to stop at once\n"
        "diffkern sample: stopped; out keeps 1 of 3 shards: the same command goes on from there\n"
    )
    calls.choose(1)
    assert make() == code
    assert "stopped; out keeps 2 of 3 shards" in capsys.readouterr().err
    assert sorted(contents()) == sorted(["manifest.json", *(f"{s}.{e}" for s in SHARDS[:2] for e in ("json", "npz"))])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert make() == 0
    assert contents() == contents("alone")

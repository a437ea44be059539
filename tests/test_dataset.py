"""Datasets in shards by one process: what is in them, what a restart keeps, and how a job ends that cannot go on."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from folders import write_tiny
from graphs import make_prompted
from PIL import Image
from sentences import expect_a_sentence

import diffkern
from diffkern import cli, options, pictures
from diffkern.cli import main
from diffkern.identity import digest
from diffkern.models.unet import UNet2D

ROOT = Path(__file__).parent.parent
N, SIZE = 10, 4  # samples, and of them in a shard: the last has 2
SHARDS = ["shard-00000", "shard-00001", "shard-00002"]


@pytest.fixture(scope="module", name="folder")
def make_folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", name="tiny")
def load_tiny(folder):
    return diffkern.load(folder)


@pytest.fixture(name="make")
def make_make(folder, tmp_path, monkeypatch):
    """Runs `diffkern sample --format npz` on the tiny model in an empty folder, into `out`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = ["--model", folder, "--steps", 2, "-n", N, "--shard-size", SIZE, "--batch-size", 2, "--out", "out"]
    return lambda *more: main(["sample", *map(str, [*given, *(() if "--format" in more else FORMAT), *more])])


FORMAT = ("--format", "npz")


def contents(folder="out"):
    """The files of a dataset, but the lock."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != ".lock"}


def arrays(folder="out"):
    """What its .npz hold, in order."""
    parts = [np.load(p) for p in sorted(Path(folder).glob("*.npz"))]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}


@pytest.fixture(scope="module", name="expected")
def draw_expected(tiny):
    """The same samples without a folder: float32 [N, 3, 8, 8]."""
    table = diffkern.make_table("dpmpp_2m", tiny.schedule, 2)
    labels = [i % 3 for i in range(N)]
    return diffkern.sample(tiny.model, table, N, labels=labels, guidance=3.0, batch_size=2)


def test_shards_hold_what_sample_draws(make, expected, capsys):
    assert make() == 0
    said = capsys.readouterr().out
    assert f"out: {N} pictures in 3 shards, checked" in said
    found = arrays()
    assert found["arr_0"].dtype == np.uint8
    assert np.array_equal(found["arr_0"], pictures.to_uint8(expected))
    assert found["ids"].tolist() == list(range(N))
    assert found["labels"].tolist() == [i % 3 for i in range(N)]
    assert [len(np.load(f"out/{name}.npz")["ids"]) for name in SHARDS] == [4, 4, 2]
    assert sorted(contents()) == sorted(["manifest.json", *(f"{s}.{end}" for s in SHARDS for end in ("json", "npz"))])
    for name in SHARDS:
        said_of = json.loads(Path(f"out/{name}.json").read_text())["sha256"]
        assert said_of == {f"{name}.npz": hashlib.sha256(Path(f"out/{name}.npz").read_bytes()).hexdigest()}
    settings = json.loads(Path("out/manifest.json").read_text())["settings"]
    assert settings["sampler"] == "dpmpp_2m"
    assert settings["labels"] == [0, 1, 2]
    assert settings["batch invariant"] is False


def test_every_format_holds_the_same_pictures(make, expected):
    pixels = pictures.to_uint8(expected)
    assert make("--format", "png", "--out", "png") == 0
    names = sorted(p.name for p in Path("png").glob("*.png"))
    assert names == [f"{i:08d}.png" for i in range(N)]
    assert all(np.array_equal(np.asarray(Image.open(f"png/{name}")), pixels[i]) for i, name in enumerate(names))

    assert make("--format", "tar", "--out", "tar") == 0
    members = []
    for name in SHARDS:
        with tarfile.open(f"tar/{name}.tar") as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                file = tar.extractfile(member)
                assert file is not None
                members.append((member.name, file.read()))
    assert [name for name, _ in members] == [f"{i:08d}.{end}" for i in range(N) for end in ("png", "cls")]
    for i in range(N):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members[2 * i][1]))), pixels[i])
        assert members[2 * i + 1][1] == str(i % 3).encode()


def test_an_iterator_gives_the_same_samples(tiny, expected):
    table = diffkern.make_table("dpmpp_2m", tiny.schedule, 2)
    batches = list(
        diffkern.sample_dataset(tiny.model, table, N, labels=[0, 1, 2], guidance=3.0, batch_size=4, progress=False)
    )
    assert [ids.tolist() for ids, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (torch.cat([x for _, x in batches]) - expected).abs().max() <= 1e-4  # another batch size
    decoded = diffkern.sample_dataset(
        tiny.model, table, N, labels=[0, 1, 2], guidance=3.0, batch_size=2, decode=lambda x: -x
    )
    assert torch.equal(torch.cat([x for _, x in decoded]), -expected)


def test_under_batch_invariance_the_batch_size_changes_no_byte(make):
    assert make("--batch-invariant") == 0
    whole = contents()
    assert make("--batch-invariant", "--batch-size", 3, "--out", "other") == 0
    assert contents("other") == whole
    (Path("out") / f"{SHARDS[1]}.npz").unlink()
    assert make("--batch-invariant", "--batch-size", 4) == 0
    assert contents() == whole


def test_a_restart_keeps_whole_shards_and_makes_the_others(make, capsys):
    assert make() == 0
    whole, written = contents(), {name: os.stat(f"out/{name}.npz").st_mtime_ns for name in SHARDS}

    def broken(change):
        change()
        capsys.readouterr()
        assert make() == 0
        assert contents() == whole
        now = {name: os.stat(f"out/{name}.npz").st_mtime_ns for name in SHARDS}
        return [name for name in SHARDS if now[name] != written[name]], written.update(now)

    shard = Path(f"out/{SHARDS[1]}.npz")
    assert broken(lambda: None)[0] == []
    assert f"{N} pictures were there before" in capsys.readouterr().out
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    for change in (
        shard.unlink,
        lambda: shard.write_bytes(data),
        lambda: shard.write_bytes(data[:100]),
        shard.with_suffix(".json").unlink,
        lambda: shard.with_suffix(".json").write_text("[[[["),
        lambda: shard.with_suffix(".json").write_bytes(whole[f"{SHARDS[1]}.json"].replace(b'"job": "', b'"job": "f')),
        lambda: shutil.copy(f"out/{SHARDS[0]}.json", shard.with_suffix(".json")),
    ):  # fmt: skip
        assert broken(change)[0] == [SHARDS[1]]
    (Path("out") / ".shard-00001.npz-abcdefgh").write_bytes(b"of a killed process")
    (Path("out") / ".mine-abcdefgh").write_bytes(b"of the user")
    assert make() == 0
    assert contents().keys() - whole.keys() == {".mine-abcdefgh"}


CHANGES = {
    ("--seed", "1"): "seed 0, not 1",
    ("--sampler", "ddim"): "sampler dpmpp_2m, not ddim and another table",
    ("--label", "flags"): "labels [0, 1, 2], not [2]",
    ("--guidance", "2"): "guidance 3.0, not 2.0",
    ("--batch-size", "4"): "batch size 2, not 4",
    ("--batch-invariant",): "batch invariant False, not True and batch size 2, not None",
    ("--backend", "reference"): "backend cpu, not reference",
    ("-n", "11"): "n 10, not 11",
    ("--format", "tar"): "format npz, not tar",
    ("--shard-size", "5"): "shard size 4, not 5",
}


def test_other_settings_are_refused_by_name(make, folder, tmp_path, capsys):
    assert make() == 0
    before = contents()
    for args, difference in CHANGES.items():
        expect_a_sentence(
            lambda args=args: make(*args), f"out holds a dataset with {difference}: give", capsys, ["out"]
        )
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    model = UNet2D.from_folder(other)
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] += 1e-6
    model.save(other, torch.float32)
    expect_a_sentence(lambda: make("--model", other), "a dataset with another model: give", capsys, ["out"])
    assert contents() == before
    Path("out/manifest.json").write_text('{"format": 3}')
    expect_a_sentence(make, "manifest.json is damaged, or of no dataset of diffkern", capsys, ["out"])


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


def test_a_folder_takes_one_job_at_a_time(make, capsys):
    os.mkdir("out")
    with FileLock("out/.lock"):
        expect_a_sentence(make, "another job is writing to out: wait for its end", capsys, ["out"])
        assert contents() == {}
    assert make() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_it_after_the_shard_the_second_at_once(make, monkeypatch, capsys, number, code):
    assert make("--out", "alone") == 0
    calls = iter(range(1000))
    forward = UNet2D.forward

    def signalled(self, *args, **kwargs):
        if next(calls) in signals:
            os.kill(os.getpid(), number)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2D, "forward", signalled)
    signals = {5, 6}  # a shard takes 4 calls, 2 of each of its 2 batches
    assert make() == code
    assert capsys.readouterr().err == (
        "diffkern sample: stopping after this shard; again to stop at once\n"
        "diffkern sample: stopped; out keeps 1 of 3 shards: the same command goes on from there\n"
    )
    calls, signals = iter(range(1000)), {1}
    assert make() == code
    assert "stopped; out keeps 2 of 3 shards" in capsys.readouterr().err
    assert sorted(contents()) == sorted(["manifest.json", *(f"{s}.{e}" for s in SHARDS[:2] for e in ("json", "npz"))])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert make() == 0
    assert contents() == contents("alone")


def test_the_bar_counts_what_was_there_before(tiny, tmp_path, capsys):
    table = diffkern.make_table("ddim", tiny.schedule, 1)

    def write():
        diffkern.sample_dataset(tiny.model, table, N, out=tmp_path, shard_size=SIZE, batch_size=2, progress=True)
        return capsys.readouterr().err.split("\r")[-1]

    assert "10/10" in write()
    (tmp_path / "shard-00002.npz").unlink()
    assert "10/10" in write()


def test_a_model_is_known_by_what_it_computes(tiny, folder):
    model, again = tiny.model, UNet2D.from_folder(folder)
    assert digest(model) == digest(again)
    again.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert digest(again) == digest(model), "the layout is nothing of the model"
    assert digest(again.double()) != digest(model)
    assert digest(model.forward) != digest(model) != digest(model.conditioning)
    with torch.no_grad():
        again = UNet2D.from_folder(folder)
        again.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert digest(again) != digest(model)
    assert digest(np.sin) != digest(np.cos)
    prompted, prompt = make_prompted()
    assert digest(prompted.given(prompt)) == digest(prompted.given(prompt.clone()))
    assert digest(prompted.given(prompt)) != digest(prompted.given(-prompt))


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffkern", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("diffkern", run_name="__main__")
    assert ended.value.code == 0
    assert diffkern.__version__ in capsys.readouterr().out


def test_every_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert options.device_of("auto") == torch.device("cuda:0")
    assert taken == [], "alone it changes nothing"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for local in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert options.device_of("auto") == options.device_of("cuda") == torch.device("cuda", local)
    assert options.device_of("cuda:0") == torch.device("cuda:0"), "what is named is taken"
    assert taken == [0, 0, 1, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this host has no GPU of its own: --nproc-per-node can be 2"):
        options.device_of("auto")


def test_torchrun_without_a_format_is_refused(make, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    expect_a_sentence(lambda: main(["sample"]), "under torchrun give --format: one of npz, png, tar", capsys)


def test_the_page_on_datasets_tells_the_truth(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    join, draw = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(draw, {})
    assert capsys.readouterr().out.startswith("8 2 0\n")
    exec(join, {})
    assert np.load("emoji.npz")["arr_0"].shape == (8, 32, 32, 3)
    settings = json.loads(Path("emoji/manifest.json").read_text())["settings"]
    assert [name for name in settings if name not in page.replace("-", " ")] == []
    for command in re.findall(r"diffkern (?:sample|likelihood) [^\n]*", page):
        words = command.split()[1:]
        cli._parser(words).parse_args(words)

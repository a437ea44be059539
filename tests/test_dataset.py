"""Datasets in shards by one process: what is in them, and what a restart keeps."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sentences import expect_a_sentence
from shards import SHARDS, SIZE, N, arrays, contents

import diffkern
from diffkern import cli, pictures
from diffkern.models.unet import UNet2D

ROOT = Path(__file__).parent.parent


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


def test_other_settings_are_refused_by_name(make, tiny_folder, tmp_path, capsys):
    assert make() == 0
    before = contents()
    for args, difference in CHANGES.items():
        expect_a_sentence(
            lambda args=args: make(*args), f"out holds a dataset with {difference}: give", capsys, ["out"]
        )
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    model = UNet2D.from_folder(other)
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] += 1e-6
    model.save(other, torch.float32)
    expect_a_sentence(lambda: make("--model", other), "a dataset with another model: give", capsys, ["out"])
    assert contents() == before
    Path("out/manifest.json").write_text('{"format": 3}')
    expect_a_sentence(make, "manifest.json is damaged, or of no dataset of diffkern", capsys, ["out"])


def test_the_bar_counts_what_was_there_before(tiny, tmp_path, capsys):
    table = diffkern.make_table("ddim", tiny.schedule, 1)

    def write():
        diffkern.sample_dataset(tiny.model, table, N, out=tmp_path, shard_size=SIZE, batch_size=2, progress=True)
        return capsys.readouterr().err.split("\r")[-1]

    assert "10/10" in write()
    (tmp_path / "shard-00002.npz").unlink()
    assert "10/10" in write()


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

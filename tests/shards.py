"""What the tests of datasets share: a tiny model, the command that makes a dataset with it, and what is in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from folders import write_tiny

import diffkern
from diffkern.cli import main

N, SIZE = 10, 4  # samples, and of them in a shard: the last has 2
SHARDS = ["shard-00000", "shard-00001", "shard-00002"]
FORMAT = ("--format", "npz")


@pytest.fixture(scope="module", name="tiny_folder")
def make_folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", name="tiny")
def load_tiny(tiny_folder):
    return diffkern.load(tiny_folder)


@pytest.fixture(name="make")
def make_make(tiny_folder, tmp_path, monkeypatch):
    """Runs `diffkern sample --format npz` on the tiny model in an empty folder, into `out`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = ["--model", tiny_folder, "--steps", 2, "-n", N, "--shard-size", SIZE, "--batch-size", 2, "--out", "out"]
    return lambda *more: main(["sample", *map(str, [*given, *(() if "--format" in more else FORMAT), *more])])


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

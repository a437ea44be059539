"""Runs of `diffkern likelihood` on a tiny model in an empty folder: the fixtures of its tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from folders import SCHEDULER, write_tiny
from PIL import Image

from diffkern.cli import main

T = 12


@pytest.fixture(scope="module", name="folder")
def make_folder(tmp_path_factory):
    """The tiny model with a schedule of few timesteps, and beside it five pictures."""
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    (folder / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, "num_train_timesteps": T}))
    (folder / "pictures").mkdir()
    for i, levels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(levels).save(folder / "pictures" / f"picture-{i}.png")
    return folder


@pytest.fixture(name="here")
def go_somewhere_empty(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def arguments(folder, *more):
    given = ["likelihood", "--model", folder, "--batch-size", 2, "--solver", "heun", "--steps", 3]
    if "--data" not in more:
        given += ["--data", folder / "pictures"]
    return list(map(str, [*given, *more]))


@pytest.fixture(name="score")
def make_score(folder, here):
    """Runs the command on the tiny model in an empty folder."""
    return lambda *more: main(arguments(folder, *more))


def read(path="likelihood.json"):
    return json.loads(Path(path).read_text())

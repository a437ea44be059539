"""`diffkern bench cold-start` and `diffkern bench all`: the first picture is one, and what is run is recorded."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentences import expect_a_sentence

import diffkern
from diffkern.bench import cold_start, curves_command, end_to_end_command, ops_command
from diffkern.bench.children import Failure, environment
from diffkern.bench.cold_start import Starts, Times
from diffkern.bench.compare import load
from diffkern.cli import main
from diffkern.op import OPS


@pytest.fixture(autouse=True)
def make_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class _Starts(Starts):
    """Seconds from a list in place of processes."""

    def __init__(self, **seconds: Any) -> None:
        self.seconds = {name: list(values) for name, values in seconds.items()}
        self.begun: list[str] = []

    def _next(self, name: str) -> Any:
        self.begun.append(name)
        found = self.seconds[name.split(":")[0]].pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    def picture(self, variant: str, cold: int | None = None) -> Any:
        return self._next(variant if cold is None else f"{variant}:{cold}")

    def phases(self) -> Any:
        return {"import torch": self._next("phases"), "sample": 1.0}


def test_starts_are_in_turn_and_the_first_only_fills_caches():
    starts = _Starts(diffkern=[50.0, 60.0, 9.0, 2.0, 3.0], diffusers=[9.0, 6.0, 6.0], phases=[0.5, 0.7])
    times = Times(starts, ["diffkern", "diffusers"], {"torch.compile": "no reason"})
    for _, call in times.runs(rounds=2, cold=2):
        call()
    assert starts.begun == ["diffkern:0", "diffkern:1", *["diffkern", "diffusers"] * 2, "phases", "diffkern",
                            "diffusers", "phases"]  # fmt: skip
    found = times.results("float32")
    assert found["variants"]["diffkern"]["cold"]["median"] == 55
    assert found["variants"]["diffkern"]["warm"]["median"] == 2.5
    assert found["variants"]["diffusers"]["diffkern is faster by"]["median"] == 2.5  # of 3 and 2, by rounds
    assert list(found["variants"]["diffusers"]) == ["warm", "diffkern is faster by"]
    assert found["phases"]["import torch"]["median"] == 0.6
    assert found["refused"] == {"torch.compile": "no reason"}


def test_what_does_not_start_is_said():
    starts = _Starts(diffkern=[9.0, 2.0], diffusers=[Failure("exit 1: no")], phases=[0.5])
    times = Times(starts, ["diffkern", "diffusers"], {})
    for _, call in times.runs(rounds=1, cold=0):
        call()
    assert times.results("float32")["refused"] == {"diffusers": "exit 1: no"}
    assert "diffusers: not timed: exit 1: no" in cold_start.in_words(times.results("float32"))


def test_ctrl_c_keeps_what_is_done(monkeypatch, capsys):
    seconds = {"diffkern": [9.0, 2.0, 3.0], "diffusers": [9.0, 6.0, KeyboardInterrupt()], "phases": [0.5]}
    monkeypatch.setattr(cold_start, "Starts", lambda *args: _Starts(**seconds))
    assert (
        main(["bench", "cold-start", "--cold", "0", "--rivals", "diffusers", "--device", "cpu", "--out", "here"]) == 130
    )
    assert capsys.readouterr().err == "diffkern bench: stopped; 2 variants were timed\n"
    (path,) = Path("here").glob("*/cold_start.json")
    found = load(path)
    assert found is not None
    assert {name: t.median for name, t in found.timings.items()} == {
        "emoji-32, float32, warm, diffkern": 2.5, "emoji-32, float32, warm, diffusers": 6.0,
    }  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_both_draw_the_same(tmp_path, monkeypatch):
    """The script with diffusers, started from diffkern's noise and clipped as diffkern clips: the same picture."""
    from diffkern.bench import first_picture

    noise = diffkern.randn(diffkern.noise_keys(0, 1), [3, 32, 32])
    starts = Starts(tmp_path, "float32", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, **options: noise)
        first_picture.by_diffusers(False, *map(str, starts.script))
    theirs = np.asarray(Image.open(starts.out)).astype(float)
    assert main(list(map(str, ["sample", *starts.sample[:-1], "ours"]))) == 0
    ours = np.asarray(Image.open("ours/0-00000.png")).astype(float)
    assert theirs.shape == ours.shape == (32, 32, 3)
    assert ours.std() > 20
    # of 255; diffusers' scheduler does not clip x0, and pictures of two seeds are 60 apart
    assert abs(theirs - ours).mean() < 4


def test_phases_add_up_to_the_start(tmp_path):
    found = Starts(tmp_path, "float32", "cpu").phases()
    assert not isinstance(found, Failure), found
    assert list(found) == ["start Python", "import torch", "import diffkern", "read the model", "load the library",
                           "sample", "write the picture"]  # fmt: skip
    assert min(found.values()) > 0
    assert Image.open(tmp_path / "picture.png").size[0] > 32


@pytest.fixture(name="asked")
def make_asked(monkeypatch):
    """What the benchmarks are asked for, in place of running them; a test says what comes of each."""
    asked: dict[str, argparse.Namespace] = {}
    outcomes: dict[str, Any] = {}

    def stand_in(name: str) -> Callable[[argparse.Namespace], int]:
        def run(args: argparse.Namespace) -> int:
            asked[name] = args
            if isinstance(outcome := outcomes.get(name, 0), BaseException):
                raise outcome
            return outcome

        return run

    parts = {"ops": ops_command, "end-to-end": end_to_end_command, "curves": curves_command, "cold-start": cold_start}
    for name, module in parts.items():
        monkeypatch.setattr(module, "_run", stand_in(name))
    return asked, outcomes


def test_all_runs_one_after_the_other(asked, capsys):
    given, outcomes = asked
    outcomes["end-to-end"] = ValueError("diffusers is not installed")
    assert main(["bench", "all", "--quick", "--rivals", "eager", "--dtype", "bfloat16", "--out", "there"]) == 1
    assert list(given) == ["ops", "end-to-end", "curves", "cold-start"]
    for args in given.values():
        assert (args.quick, args.rivals, args.out) == (True, "eager", Path("there"))
        assert "bfloat16" in args.dtype
    assert "end-to-end: not timed: diffusers is not installed\n" in capsys.readouterr().out
    outcomes["end-to-end"] = 0
    assert main(["bench", "all", "--quick"]) == 0
    outcomes["end-to-end"] = KeyboardInterrupt("2 records were written")
    given.clear()
    assert main(["bench", "all"]) == 130
    assert list(given) == ["ops", "end-to-end"]
    assert capsys.readouterr().err == "diffkern bench: stopped; in end-to-end 2 records were written\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_the_whole_suite_runs():
    """As a user starts it, with small sizes. No figure is judged, only that each is there."""
    words = ["bench", "all", "--tiny", "--rivals", "none", "--dtype", "bfloat16", "--out", "here"]
    variables = {**environment(), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-m", "diffkern.cli", *words], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {path.stem: path for path in Path("here").glob("*/*.json")}
    timed = set(OPS) - {"conv2d_moments"}  # which has no kernel for a CPU
    assert set(records) == {*(f"ops-{name}" for name in timed), "end_to_end-vae-512-bfloat16", "cold_start"}
    for path in records.values():
        found = load(path)
        assert found is not None
        assert found.timings
    machine = json.loads(records["cold_start"].read_text(encoding="utf-8"))["machine"]
    assert machine["command"] == "diffkern bench all --tiny --rivals none --dtype bfloat16"


WRONG = {
    ("all", "--dtype", "float16"): "no dtype is named 'float16': choose one of float32, bfloat16",
    ("all", "--rivals", "jax"): "no rival is named 'jax': choose one of eager, compile, ",
    ("cold-start", "--rivals", "jax"): "no rival is named 'jax': choose one of eager, compile, ",
    ("cold-start", "--dtype", "int8"): "no dtype is named 'int8': choose one of float32, bfloat16",
    ("cold-start", "--device", "tpu"): "no device is named 'tpu': choose one of auto, cpu, cuda",
    ("cold-start", "--rounds", "0"): "--rounds must be at least 1, not 0",
    ("cold-start", "--cold", "-1"): "--cold must be at least 0, not -1",
}


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_input_gets_a_sentence(args, capsys):
    expect_a_sentence(lambda: main(["bench", *args]), WRONG[args], capsys)

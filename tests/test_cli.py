"""The command line as a user meets it: pictures out, and one sentence and exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import LABELS, write_tiny
from PIL import Image
from sentences import expect_a_sentence

import diffkern
from diffkern.cli import main
from diffkern.models.folder import WEIGHTS


@pytest.fixture(scope="module", name="folder")
def make_folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(name="draw")
def make_draw(folder, tmp_path, monkeypatch):
    """Runs `diffkern sample` on the tiny model in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *args: main(["sample", "--model", str(folder), "--steps", "3", "-n", "5", *map(str, args)])


def test_a_grid_is_the_default(draw, capsys):
    assert draw() == 0
    out = capsys.readouterr().out
    for said in (
        "5 pictures, dpmpp_2m, 3 steps, seed 0, guidance 3",
        "float32, backends: ",
        "ms a step",
        "samples.png",
    ):
        assert said in out
    with Image.open("samples.png") as picture:
        assert picture.size == (3 * (8 * 12 + 2) + 2, 2 * (8 * 12 + 2) + 2)
        assert len(picture.getcolors(1 << 20) or []) > 20
    assert os.listdir() == ["samples.png"]


def test_the_three_kinds_of_output_hold_the_same_pictures(draw):
    assert draw("--out", "a.npy") == 0
    assert draw("--out", "folder") == 0
    samples = np.load("a.npy")
    assert samples.shape == (5, 3, 8, 8)
    assert samples.dtype == np.float32
    assert sorted(os.listdir("folder")) == [f"0-0000{i}.png" for i in range(5)]
    with Image.open("folder/0-00003.png") as picture:
        pixels = np.asarray(picture)
    expected = np.round((samples[3].clip(-1, 1) + 1) * 127.5).transpose(1, 2, 0)
    assert np.abs(pixels - expected).max() <= 1


def test_seed_label_and_guidance_change_the_pictures(draw):
    def numbers(*args):
        assert draw("--out", "x.npy", *args) == 0
        return np.load("x.npy")

    plain = numbers()
    assert np.array_equal(plain, numbers())
    # The same two pictures, beside others that make for fewer different labels: 1e-4 as in another batch.
    assert np.abs(plain[[0, 3]] - numbers("--label", "smileys")[[0, 3]]).max() <= 1e-4
    assert not np.allclose(plain[1], numbers("--label", "smileys")[1])
    assert np.array_equal(plain, numbers(*(a for label in LABELS for a in ("--label", label))))
    assert not np.allclose(plain, numbers("--seed", 1))
    assert not np.allclose(plain, numbers("--guidance", 4))
    assert np.abs(plain - numbers("--batch-size", 2)).max() <= 1e-4


def test_the_reference_draws_the_same_pictures(draw):
    assert draw("--out", "auto.npy") == 0
    assert draw("--out", "reference.npy", "--backend", "reference") == 0
    assert np.abs(np.load("auto.npy") - np.load("reference.npy")).max() <= 1e-3


def spoil(folder, tmp_path, name, change):
    """A copy of the model folder with one file changed."""
    copy = tmp_path / "spoilt"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


WRONG = {
    ("--sampler", "sde9"): "no sampler is named 'sde9': choose one of ddpm, ddim",
    ("--label", "dragons"): "no label is named 'dragons': choose one of Smileys & Emotion, Food & Drink, Flags",
    ("--label", "f"): "more than one label begins with 'f': choose one of",
    ("--label", ""): "no label is named ''",
    ("--model", "nothing-here"): "no model is named 'nothing-here': give a folder with a model or one of",
    ("--dtype", "int8"): "no dtype is named 'int8': choose one of float32, bfloat16, float16",
    ("--backend", "opencl"): "no backend is named 'opencl': choose one of auto, cpu, triton, cuda, torch, reference",
    ("--device", "tpu"): "no device is named 'tpu' here: choose one of auto, cpu",
    ("--steps", "0"): "steps",
    ("--steps", "many"): "argument --steps: invalid int value: 'many'",
    ("-n", "0"): "-n must be at least 1, not 0",
    ("-n", "-4"): "-n must be at least 1, not -4",
    ("--batch-size", "0"): "--batch-size must be at least 1, not 0",
    ("--guidance", "nan"): "finite",
    ("--seed", str(1 << 64)): "does not fit in 64 bits",
    ("--out", "a.jpg"): "cannot write a.jpg: give a name that ends in .png or .npy, or a folder",
    ("--out", "no/such/place.png"): "cannot write no/such/place.png: no/such is not a folder",
    ("--nonsense",): "unrecognized arguments: --nonsense",
}


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_input_gets_a_sentence(draw, args, capsys):
    expect_a_sentence(lambda: draw(*args), WRONG[args], capsys)


SPOILT = {
    "truncated weights": (WEIGHTS, lambda b: b[: len(b) // 2], "is corrupt or truncated"),
    "flipped header": (WEIGHTS, lambda b: b"\xff" * 8 + b[8:], "is corrupt or truncated"),
    "broken config": ("config.json", lambda b: b[:-9], "is not valid JSON"),
    "unknown schedule": ("scheduler_config.json", lambda b: b.replace(b"squaredcos_cap_v2", b"spiral"), "spiral"),
    "labels beyond the classes": ("labels.json", lambda b: b.replace(b"3}", b"9}"), "null_label must be a class"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_model_gets_a_sentence(draw, folder, tmp_path, name, capsys):
    file, change, message = SPOILT[name]
    copy = spoil(folder, tmp_path, file, change)
    expect_a_sentence(lambda: draw("--model", copy), message, capsys)


def test_a_failed_write_leaves_the_old_file(draw, monkeypatch, capsys):
    assert draw() == 0
    before = Path("samples.png").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert draw("--seed", 1) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert Path("samples.png").read_bytes() == before
    assert os.listdir() == ["samples.png"]


def test_a_forced_backend_that_cannot_run_says_why(draw, capsys):
    expect_a_sentence(lambda: draw("--backend", "cuda"), "'cuda' was forced but", capsys)


def test_doctor_says_what_is_ready(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["diffkern"] == diffkern.__version__
    assert facts["backends"]["reference"] == "ready"
    assert set(facts["backends"]) == {"cpu", "triton", "cuda", "torch", "reference"}
    assert all(facts["backends"].values())
    assert set(facts["cache"]) == {"path", "files", "bytes"}
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert facts["cache"]["path"] in text
    assert facts["versions"]["torch"] in text


def test_exit_codes_of_the_real_command():
    done = subprocess.run(
        [sys.executable, "-m", "diffkern.cli", "sample", "--steps", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("diffkern sample: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_who_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "diffkern", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 141  # as of a program that the signal ends


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffkern", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("diffkern", run_name="__main__")
    assert ended.value.code == 0
    assert diffkern.__version__ in capsys.readouterr().out

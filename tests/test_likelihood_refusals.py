"""`diffkern likelihood`: one sentence and exit code 2 for whatever is wrong, and nothing overwritten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import CONFIG, SCHEDULER, write_tiny
from graphs import make_prompted
from likelihood_runs import T, read
from sentences import expect_a_sentence

import diffkern
from diffkern.likelihood import command
from diffkern.likelihood.run import METHODS
from diffkern.models.unet import UNet2D

WRONG = {
    ("--method", "unipc"): "'unipc' is a sampler, which draws pictures and gives no likelihood: choose one of vlb, vdm",
    ("--method", "magic"): "no method is named 'magic': choose one of vlb, vdm, ode, all",
    ("--data", "cats"): "no data is named 'cats': give a folder of PNGs or one of held-out, train, digits, noise",
    ("--data", "."): ". has no picture whose name ends in .png",
    ("-n", "0"): "-n must be at least 1, not 0",
    ("--repeats", "0"): "--repeats must be at least 1, not 0",
    ("--batch-size", "0"): "--batch-size must be at least 1, not 0",
    ("--terms", str(T)): f"--terms must be all, or from 3 to {T - 1}, the number of transitions, not {T}",
    ("--terms", "-1"): "--terms must be all, or from 3",
    ("--tolerance", "nan"): "--tolerance must be finite and > 0, not nan",
    ("--solver", "euler9"): "no solver is named 'euler9': choose one of dopri5",
    ("--variance", "big"): "no variance is named 'big': choose one of fixed_small",
    ("--divergence", "curl"): "no divergence is named 'curl': choose one of hutchinson, difference, exact",
    (
        "--divergence",
        "difference",
        "--dtype",
        "bfloat16",
    ): "--divergence difference says nothing in bfloat16: take hutchinson, or",
    ("--dequantization", "no"): "no dequantization is named 'no': choose one of uniform, variational",
    ("--label", "dragons"): "no label is named 'dragons'",
    ("--dtype", "int8"): "no dtype is named 'int8': choose one of",
    ("--device", "tpu"): "no device is named 'tpu' here",
    ("--seed", str(1 << 64)): "does not fit in 64 bits",
    ("--out", "no/such/place.json"): "cannot write no/such/place.json: no/such is not a folder",
    ("--plot", "terms.gif"): "cannot draw terms.gif: give a name that ends in .png, .svg, .pdf",
    ("--plot", "terms.png", "--method", "ode"): "--plot draws the terms of vlb and vdm: ask for one of them too",
    ("--plot", "no/such/place.png"): "cannot write no/such/place.png: no/such is not a folder",
}


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_input_gets_a_sentence(score, args, capsys):
    expect_a_sentence(lambda: score(*args), WRONG[args], capsys)


def test_a_file_of_another_run_is_left_alone(score, folder, tmp_path, capsys):
    assert score("--method", "vlb", "-n", 1) == 0
    before = Path("likelihood.json").read_bytes()
    other = write_tiny(tmp_path / "other")
    for args, said in (
        (("--seed", 1, "--repeats", 2), "holds a run with seed 0, not 1 and repeats 1, not 2: give another --out, or"),
        (("-n", 2), f"1 pictures of {folder / 'pictures'}, not 2"),
        (("--model", other), "another model"),
        (("--label", "food"), f"other labels of {folder / 'pictures'}"),
    ):
        given = ("--method", "vlb", "-n", 1, *args)
        expect_a_sentence(lambda given=given: score(*given), said, capsys, left=["likelihood.json"])
        assert Path("likelihood.json").read_bytes() == before
    assert score("--method", "vlb", "-n", 1, "--seed", 1, "--restart") == 0
    assert read()["settings"]["seed"] == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "x"}', "half"])
def test_a_damaged_file_is_left_alone(score, content, capsys):
    if content == "half":
        assert score("--method", "vlb", "-n", 2) == 0
        value = read()
        value["results"][0]["log_p"].pop()
        content = json.dumps(value)
    Path("likelihood.json").write_text(content)
    message = "likelihood.json is damaged, or no result of this command: give another --out, or --restart"
    expect_a_sentence(lambda: score("--method", "vlb", "-n", 2), message, capsys, left=["likelihood.json"])
    assert Path("likelihood.json").read_text() == content


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_no_figures(score, folder, method, monkeypatch, capsys):
    load = diffkern.load

    def broken(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.state_dict()["conv_out.bias"][0] = torch.nan
        return model

    monkeypatch.setattr(command, "load", broken)
    message = "that are not finite in bfloat16: try --dtype float32"
    expect_a_sentence(lambda: score("--method", method, "--dtype", "bfloat16"), message, capsys)


def test_a_model_of_latents_or_with_a_prompt_is_refused(score, tmp_path, capsys):
    latents, prompted = tmp_path / "latents", tmp_path / "prompted"
    UNet2D(replace(CONFIG, in_channels=4, out_channels=4)).save(latents, torch.float32)
    make_prompted()[0].save(prompted, torch.float32)
    for folder, said in (
        (latents, "the model's samples are 4 x 8 x 8, and no pictures of 1 or 3 channels"),
        (prompted, "prompted needs a prompt: only models of pictures alone are scored"),
    ):
        (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
        expect_a_sentence(lambda folder=folder: score("--model", folder), said, capsys)

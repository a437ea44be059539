"""`diffkern bench ops --shapes`: every workload belongs to a model, and calls of one's own are what the file says."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from sentences import expect_a_sentence

from diffkern.bench import ops, record, shapes
from diffkern.cli import main
from diffkern.op import OPS

QUICKLY = ("--device", "cpu", "--dtype", "float32", "--rounds", "2", "--rivals", "none", "--out", "here")


@pytest.fixture(autouse=True)
def make_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(calls: object) -> Path:
    path = Path("calls.json")
    path.write_text(json.dumps(calls), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", OPS)
def test_every_workload_comes_from_one_model(name):
    for sample in OPS[name].make_samples("cpu", torch.float32):
        models = [model for model, begins in shapes.MODELS.items() if sample.name.startswith(begins)]
        assert len(models) == 1 or not sample.workload, f"{sample.name} is of {models}: see shapes.MODELS"
        assert shapes.model_of(sample) == (models[0] if sample.workload else None)


def test_only_a_model_is_timed():
    options = Namespace(op=sorted(OPS), dtype=["float32"], device="cpu", tiny=False, quick=False, shapes="emoji")
    chosen = {(op.name, sample.name) for op, _, sample in ops.work(options)}
    assert {("attention", "emoji UNet 8x8"), ("conv2d", "emoji UNet 16x16")} <= chosen
    assert all(sample.startswith("emoji") for _, sample in chosen)
    options.op, options.shapes, options.device = ["rms_norm"], "flux", "cuda"
    assert ("rms_norm", "FLUX.1 1024x1024, 4 pictures") in {(op.name, s.name) for op, _, s in ops.work(options)}


def test_calls_from_a_file_are_timed():
    calls = {
        "rms_norm": [{"x": [2, 5, 24], "weight": [24], "eps": 1e-5}],
        "group_norm_silu": [{"x": [2, 8, 4, 4], "num_groups": 2, "skip": [2, 4, 4, 4], "layout": "channels_last"}],
    }
    assert main(["bench", "ops", "--shapes", str(write(calls)), *QUICKLY]) == 0
    found = {path.name: path for path in Path("here").glob("*/*.json")}
    assert set(found) == {"ops-rms_norm.json", "ops-group_norm_silu.json"}
    (row,) = json.loads(found["ops-rms_norm.json"].read_text(encoding="utf-8"))["results"]
    assert row["sample"] == "x 2x5x24, weight 24, eps 1e-05"
    assert row["bytes"] == 2 * 2 * 5 * 24 * 4

    x, groups, *_, skip, _, _ = shapes.arguments(
        OPS["group_norm_silu"], calls["group_norm_silu"][0], "cpu", torch.bfloat16
    )
    assert x.shape == (2, 8, 4, 4)
    assert (x.dtype, groups, skip.shape) == (torch.bfloat16, 2, (2, 4, 4, 4))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert skip.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(x[:, :4], skip)


def test_the_list_has_every_workload(capsys):
    assert main(["bench", "ops", "--list", "--device", "cpu"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "rms_norm DiT-S/2 256x256 dit" in lines
    assert "conv2d SDXL UNet 64x64 sdxl cuda only" in lines
    assert len(lines) == 1 + sum(bool(s.workload) for op in OPS.values() for s in op.make_samples("cpu", torch.float32))


def test_a_record_names_no_folder_of_a_file(monkeypatch):
    for words, said in {
        "/bin/diffkern bench ops --shapes /home/me/x.json": "diffkern bench ops --shapes x.json",
        "/bin/diffkern bench ops --shapes=/home/me/x.json": "diffkern bench ops --shapes=x.json",
        "/bin/diffkern bench ops --shapes sd15": "diffkern bench ops --shapes sd15",
    }.items():
        monkeypatch.setattr("sys.argv", words.split())
        assert record.machine()["command"] == said


WRONG = {
    "no JSON": ("{", "calls.json is not valid JSON"),
    "a list": ([1], "calls.json does not say ops and their calls, as {"),
    "no calls": ({"rms_norm": []}, "calls.json does not say ops and their calls"),
    "no op": ({"softmax": [{}]}, "calls.json: no op is named 'softmax': choose one of add_noise"),
    "no name": ({"rms_norm": [[2, 3]]}, "rms_norm, [2, 3]: give the arguments by name, of x, weight, eps"),
    "no argument": ({"rms_norm": [{"y": [2, 3]}]}, "there is no argument y: it takes x, weight, eps"),
    "no x": ({"rms_norm": [{"weight": [3]}]}, "missing a required argument: 'x'"),
    "no layout": ({"rms_norm": [{"x": [2, 3], "layout": "NHWC"}]}, "no layout is named 'NHWC': choose one of contig"),
    "two sizes": ({"rms_norm": [{"x": [2, 3], "weight": [4]}]}, 'rms_norm, {"x": [2, 3], "weight": [4]}: '),
    "noise": ({"randn": [{"shape": [3, 32, 32]}]}, "keys is made by the op's own workloads only: choose one of sd15"),
    "no number": ({"rms_norm": [{"x": ["a"]}]}, 'rms_norm, {"x": ["a"]}: '),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_gets_a_sentence(name, capsys):
    content, message = WRONG[name]
    path = write(content)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    run = lambda: main(["bench", "ops", "--shapes", "calls.json", *QUICKLY])  # noqa: E731
    expect_a_sentence(run, message, capsys, left=["calls.json"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shapes", "sd4"], "--shapes is none of sd15, sdxl, dit, cifar, emoji, flux, "),
        (["--shapes", "emoji", "--op", "rms_norm"], "there is no workload of emoji for rms_norm on cpu: see --list"),
        (["--shapes", "emoji", "--tiny"], "give --tiny or --shapes, not both"),
    ],
)
def test_wrong_shapes_get_a_sentence(args, message, capsys):
    expect_a_sentence(lambda: main(["bench", "ops", *QUICKLY, *args]), message, capsys)

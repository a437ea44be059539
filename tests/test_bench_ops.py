"""`diffkern bench ops`: a wrong kernel is not timed, figures are counted right, and what was timed is kept."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from sentences import expect_a_sentence

from diffkern.bench import ops, record
from diffkern.bench.compare import compare, load
from diffkern.bench.plain import PLAIN
from diffkern.cli import main
from diffkern.op import OPS, Cost

QUICKLY = ("--device", "cpu", "--tiny", "--rounds", "2", "--rivals", "eager", "--dtype", "float32", "--out", "here")


@pytest.fixture(autouse=True)
def make_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def records() -> dict[str, Path]:
    return {path.name: path for path in Path("here").glob("*/*.json")}


def test_a_record_says_what_was_timed(capsys):
    assert main(["bench", "ops", "--op", "rms_norm", "--op", "linear", *QUICKLY]) == 0
    assert set(records()) == {"ops-rms_norm.json", "ops-linear.json"}
    (row,) = json.loads(records()["ops-rms_norm.json"].read_text(encoding="utf-8"))["results"]
    assert (row["op"], row["dtype"]) == ("rms_norm", "float32")
    assert {"reference", "torch", "copy"} <= set(row["times"]) <= {"cpu", "triton", "torch", "reference", "copy"}
    for found in row["times"].values():
        assert 0 < found["us"]["p20"] <= found["us"]["median"] <= found["us"]["p80"]
        assert found["GB/s"] == pytest.approx(row["bytes"] / found["us"]["median"] / 1e3, rel=0.01)
    assert row["times"]["copy"]["of copy"] == 1
    (row,) = json.loads(records()["ops-linear.json"].read_text(encoding="utf-8"))["results"]
    assert row["times"]["matmul"]["of matmul"] == 1
    out = capsys.readouterr().out
    assert "reference" in out
    assert "times as fast" in out
    assert "100 % of matmul" in out
    folder = records()["ops-linear.json"].parent
    assert {c.verdict for c in compare(folder, folder).changes} == {"noise"}


def test_a_record_says_which_backend_a_call_takes_by_itself(monkeypatch):
    """If that was timed."""
    args = OPS["rms_norm"].bind(torch.ones(1, 2, 8))
    assert ops._chosen(OPS["rms_norm"], args, {"cpu": {}, "torch": {}}) == {"chosen": "cpu"}
    assert ops._chosen(OPS["rms_norm"], args, {"torch": {}}) == {}
    (first, *rest) = OPS["rms_norm"].backends
    cpu = next(b for b in (first, *rest) if b.name == "cpu")
    left = [dataclasses.replace(b, defers=lambda *_: "slower") if b is cpu else b for b in (first, *rest)]
    monkeypatch.setattr(OPS["rms_norm"], "backends", left)
    assert ops._chosen(OPS["rms_norm"], args, {"cpu": {}, "reference": {}}) != {"chosen": "cpu"}


def test_figures_are_counted_from_cost_and_ceilings():
    found = ops.figures([2e-3, 2e-3, 2e-3], Cost(4_000_000, 6_000_000), [1e-3, 1e-3, 1e-3], [5e-4, 5e-4, 5e-4])
    assert found == {
        "us": {"median": 2000.0, "p20": 2000.0, "p80": 2000.0},
        "GB/s": 2.0, "of copy": 0.5, "GFLOP/s": 3.0, "of matmul": 0.25,
    }  # fmt: skip
    assert record.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert record.ratio([4.0, 9.0, 8.0], [2.0, 3.0, 2.0])["median"] == 3.0


def test_a_row_in_words():
    cost = Cost(4_000_000, 6_000_000_000)
    seconds = {"cpu": [1e-3, 1e-3], "torch": [3e-3, 3e-3], "reference": [9e-4, 1.3e-3], "copy": [5e-4, 5e-4]}
    times = {name: ops.figures(s, cost, seconds["copy"], [8e-4, 8e-4]) for name, s in seconds.items()}
    row = {"op": "linear", "sample": "DiT", "dtype": "float32", "times": times, "refused": {"OpenVINO": "has none"}}
    lines = [" ".join(line.split()) for line in ops.in_words(row).splitlines()]
    assert lines[1:] == [
        "cpu 1000 us (1000 to 1000) 6 TFLOP/s 80 % of matmul",
        "torch 3000 us (3000 to 3000) 2 TFLOP/s 27 % of matmul cpu is 3 times as fast",
        "reference 1100 us (980 to 1220) 5.45 TFLOP/s 75 % of matmul cpu is 1.1 times as fast, within noise",
        "copy 500 us (500 to 500) 8 GB/s 100 % of copy",
        "OpenVINO: not timed: has none",
    ]


def test_calls_are_timed_in_turn():
    order: list[str] = []
    found = record.interleave({name: functools.partial(order.append, name) for name in "ab"}, 3)
    assert "".join(order) == "ababab"
    assert [len(times) for times in found.values()] == [3, 3]


def test_short_calls_are_timed_for_a_while_and_long_ones_once(monkeypatch):
    now, calls = [0.0], {"short": 0, "long": 0}

    def call(name: str, seconds: float) -> None:
        now[0] += seconds
        calls[name] += 1

    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])
    runs = {"short": functools.partial(call, "short", 0.25), "long": functools.partial(call, "long", 3.0)}
    found = record.interleave(runs, 2, at_least=1.0)
    assert found == {"short": [0.25, 0.25], "long": [3.0, 3.0]}
    assert calls == {"short": 3 + 2 * 4, "long": 1 + 2}  # to see how long one takes, and in two rounds


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    op = OPS["timestep_embedding"]
    (first, *rest) = op.backends
    monkeypatch.setattr(op, "backends", [dataclasses.replace(first, run=lambda *a: first(*a) + 1e-3), *rest])
    command = ["bench", "ops", "--op", "timestep_embedding", "--backend", first.name, *QUICKLY]
    assert main([*command, "--op", "rms_norm"]) == 1
    out = capsys.readouterr().out
    assert f"timestep_embedding on {first.name}, result 0: error 0.001" in out
    assert "times what is allowed" in out
    assert set(records()) == {"ops-rms_norm.json"}


def test_rivals_and_backends_are_chosen():
    op = OPS["rms_norm"]
    args = op.bind(*next(op.make_samples("cpu", torch.float32)).args())
    able = [b.name for b in op.backends if b.why_not(args) is None]

    def names(*kinds: str, backend: tuple[str, ...] = ()) -> set[str]:
        return set(ops.calls(op, args, Namespace(device="cpu", rivals=kinds, backend=list(backend))))

    assert names() == {*able, "copy"}
    assert names("eager") == {*able, "torch", "reference", "copy"}
    assert names("compile") == {*able, "torch, compiled", "reference, compiled", "copy"}
    assert names("library", backend=("cpu",)) == {*({"cpu"} & set(able)), "copy"}


def test_a_backend_that_is_not_there_is_said(capsys):
    assert main(["bench", "ops", "--op", "rms_norm", "--backend", "cuda", *QUICKLY]) == 1
    assert "not timed: rms_norm has no cuda that can take it here" in capsys.readouterr().out
    assert not records()


def test_ctrl_c_keeps_what_is_done(monkeypatch, capsys):
    time = ops.Bench.time

    def stopped(bench, item, ceilings):
        if item[0] == "rms_norm":
            raise KeyboardInterrupt
        return time(bench, item, ceilings)

    monkeypatch.setattr(ops.Bench, "time", stopped)
    command = ["bench", "ops", "--op", "timestep_embedding", "--op", "rms_norm", "--op", "linear", *QUICKLY]
    assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "diffkern bench: stopped; 1 calls were timed"
    assert set(records()) == {"ops-timestep_embedding.json"}


def test_quick_is_one_workload_in_one_dtype():
    options = Namespace(op=sorted(OPS), dtype=["float32"], device="cpu", tiny=False, quick=True, shapes=None)
    chosen = [(op.name, sample.workload) for op, _, sample in ops.work(options)]
    assert chosen == [(name, True) for name in sorted(OPS)]


def test_processes_check_and_time():
    command = ["bench", "ops", "--op", "timestep_embedding", *QUICKLY, "--processes", "1"]
    root = {"PYTHONPATH": os.pathsep.join(sys.path)}  # -P: not the folder that this runs in
    done = subprocess.run(
        [sys.executable, "-m", "diffkern.cli", *command], env={**os.environ, **root}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "checked 1 calls in" in done.stdout
    found = load(records()["ops-timestep_embedding.json"])
    assert found is not None
    assert all(name.startswith("timestep_embedding, ") for name in found.timings)


def test_a_record_names_no_folder_of_the_user(monkeypatch):
    for words, said in {
        "/home/me/bin/diffkern bench ops --out /home/me/x --op randn": "diffkern bench ops --op randn",
        "/home/me/diffkern/cli.py bench ops --out=/home/me/x": "diffkern bench ops",
        "benchmarks/bench_vlb.py --state /home/me/s --images 2": "python benchmarks/bench_vlb.py --images 2",
    }.items():
        monkeypatch.setattr(sys, "argv", words.split())
        assert record.machine()["command"] == said


def test_the_commit_is_that_of_diffkern(monkeypatch):
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
        )

    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    folder = Path("site-packages/diffkern").absolute()
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.setattr(record, "PACKAGE", folder)
    assert record.machine()["commit"] is None
    git("add", ".")
    git("commit", "-m", "diffkern")
    assert len(record.machine()["commit"]) >= 7


def test_what_one_would_write_belongs_to_an_op():
    assert set(PLAIN) <= set(OPS)


WRONG = {
    ("--op", "softmax"): "no op is named 'softmax': choose one of ",
    ("--backend", "reference"): "no backend is named 'reference': choose one of cpu, triton, cuda, torch",
    ("--dtype", "int8"): "no dtype is named 'int8': choose one of float32, bfloat16, float16",
    ("--rivals", "eager,jax"): "no rival is named 'jax': choose one of eager, compile, ",
    ("--device", "tpu"): "no device is named 'tpu' here: choose one of auto, cpu",
    ("--rounds", "0"): "--rounds must be at least 1, not 0",
    ("--threads", "0"): "--threads must be at least 1, not 0",
    ("--processes", "-1"): "--processes must be at least 0, not -1",
}


def test_where_nothing_can_be_written_nothing_is_timed(monkeypatch, capsys):
    Path("here").touch()
    monkeypatch.setattr(ops, "run", lambda options: pytest.fail("timed"))
    expect_a_sentence(lambda: main(["bench", "ops", *QUICKLY]), "cannot write here: ", capsys, left=["here"])


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_input_gets_a_sentence(args, capsys):
    expect_a_sentence(lambda: main(["bench", "ops", *args]), WRONG[args], capsys)

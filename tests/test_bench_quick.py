"""Benchmarks as a user starts them, in a process of their own. What a record must have is judged, and no number is."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffkern.bench import memory
from diffkern.op import OPS

ROOT = Path(__file__).parent.parent


def run(*command: str, folder: Path = ROOT) -> str:
    """What it printed."""
    # Within a worker of pytest-xdist pytest-benchmark would not time.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    quiet = {"OMP_WAIT_POLICY": "passive", "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command], cwd=folder, env={**outside, **quiet}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_op_is_timed_quickly(tmp_path):
    command = ("diffkern.cli", "bench", "ops", "--quick", "--rounds", "2", "--device", "cpu", "--out", "here")
    out = run(*command, folder=tmp_path)
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("here/*/*.json")}
    timed = {name: op for name, op in OPS.items() if name != "conv2d_moments"}  # which has no kernel for a CPU
    assert set(records) == {f"ops-{name}" for name in timed}
    for name, op in timed.items():
        found = records[f"ops-{name}"]
        assert {"date", "versions", "devices", "threads", "commit", "command"} <= set(found["machine"])
        assert found["machine"]["command"].endswith("bench ops --quick --rounds 2 --device cpu")
        assert found["left out"] == {}
        (row,) = found["results"]
        workloads = [s.name for s in op.make_samples("cpu", torch.float32) if s.workload]
        assert (row["op"], row["sample"], row["refused"]) == (name, workloads[0], {})
        assert {"reference", "copy"} <= set(row["times"])
        assert f"{name}, {row['sample']}, {row['dtype']}" in out
        for figures in row["times"].values():
            assert {"us", "GB/s", "of copy"} <= set(figures)
            assert 0 < figures["us"]["p20"] <= figures["us"]["median"] <= figures["us"]["p80"]
            assert ("peak MB" in figures) == (memory.peak_mb(lambda: None, "cpu") is not None)


def test_pytest_benchmark_finds_every_op(tmp_path):
    pytest.importorskip("pytest_benchmark")
    cases = [case.id for case in runpy.run_path(str(ROOT / "benchmarks" / "test_ops.py"))["cases"]()]
    assert len(set(cases)) == len(cases)
    assert all(any(case.startswith(f"{name}-reference-bfloat16-") for case in cases) for name in OPS)
    out = tmp_path / "out.json"
    few = ("--benchmark-max-time", "0.01", "--benchmark-min-rounds", "1", "--benchmark-json", str(out))
    command = ("pytest", "benchmarks", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "--benchmark-only", *few)
    run(*command, "-k", "timestep_embedding and reference and float32")
    (found,) = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    assert found["name"] == "test_op[timestep_embedding-reference-float32-DiT]"
    info = found["extra_info"]
    assert (info["model"], info["bytes"]) == ("dit", 4 * 128 * 256)
    assert info["GB/s"] == pytest.approx(info["bytes"] / found["stats"]["median"] / 1e9)
    assert {"versions", "devices", "threads", "commit"} <= set(info)

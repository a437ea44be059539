"""The report of records that a GPU made: what its tables say of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import report

MACHINE = {"devices": {"cpu": "a CPU, 16 of 16 threads, AMX", "cuda:0": "NVIDIA H200"}, "threads": 16,
           "versions": {"torch": "2.11.0+cu130"}}  # fmt: skip


def spread(value: float) -> dict[str, float]:
    return {"median": value, "p20": value, "p80": value}


def form(ms: float, against: str, times: float) -> dict[str, Any]:
    return {"ms": spread(ms), "against": against, "diffkern is faster by": spread(times), "max delta": 0.01,
            "first call, seconds": 1.0, "later call, seconds": ms / 1e3, "peak memory, MB": 10}  # fmt: skip


@pytest.fixture
def records(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    graphed = "diffkern, graphed"
    variants = {
        "diffkern": form(8.0, "diffkern", 1.0),
        graphed: form(4.0, graphed, 1.0),
        "diffusers": form(20.0, "diffkern", 2.5),
        "diffusers, graphed": form(10.0, graphed, 2.5),
        "diffusers, accelerated, graphed": form(5.0, graphed, 1.25),
        "torch.compile": form(12.0, "diffkern", 1.5),
        "torch.compile, max-autotune": form(6.0, graphed, 1.5),
    }
    network = {"network": "sd15", "what": "a UNet", "dtype": "bfloat16", "variants": variants,
               "refused": {"torch.compile, graphed": "no time"}, "profile": {"a kernel": 0.5}}  # fmt: skip

    def figures(us: float, floor: float) -> dict[str, Any]:
        return {"us": spread(us), "GB/s": 8e4 / us, "of copy": 0.5, "of floor": floor, "us without a graph": 30.0}

    row = {"op": "randn", "sample": "pictures", "dtype": "bfloat16", "bytes": 1, "flops": 1, "chosen": "cuda",
           "ceilings": {"GB/s": 4300.0, "TFLOP/s": 788.0}, "refused": {},
           "times": {"cuda": figures(25, 0.8), "triton": figures(30, 0.6), "torch": figures(100, 0.2),
                     "copy": figures(20, 1.0)}}  # fmt: skip
    product = {**row, "op": "attention", "chosen": "torch", "times": {
        "torch": {**figures(10, 0.5), "GFLOP/s": 400e3, "of matmul": 0.5},
        "triton": {**figures(20, 0.25), "GFLOP/s": 200e3, "of matmul": 0.25},
        "cuDNN": {**figures(9, 0.55), "GFLOP/s": 440e3, "of matmul": 0.55}, "copy": figures(2, 1.0),
    }}  # fmt: skip
    for name, results in {"end_to_end-sd15": network, "ops-randn": [row], "ops-attention": [product]}.items():
        (folder / f"{name}.json").write_text(json.dumps({"machine": MACHINE, "results": results}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)


def test_a_network_is_compared_with_and_without_a_graph(records):
    summary = report.readme_with_figures()
    assert "NVIDIA H200, torch 2.11.0+cu130. A call replayed from a CUDA graph" in summary
    assert "| sd15, bfloat16 | 4 ms | 1.50 | 2.50 | 1.25 | 8 ms | 2.50 |" in summary
    details = report.details()
    assert "| torch.compile, max-autotune | 6 (6 to 6) | 1.50 (1.50 to 1.50) |" in details
    assert "| torch.compile, graphed | not timed: no time |" in details


def test_an_op_is_measured_by_the_floor_of_the_device(records):
    assert "a copy 4300 GB/s, read and written; a bfloat16 product 788 TFLOP/s" in report.readme_with_figures()
    details = report.details()
    assert "| randn | pictures | bfloat16 | cuda | 25 (25 to 25) | 3200 GB/s | 80 % | torch | 4.00 |" in details
    assert "| attention | pictures | bfloat16 | torch | 10 (10 to 10) | 400 TFLOP/s | 50 % | cuDNN | 0.90 |" in details

"""Every op on the workloads of models, for pytest-benchmark:

    pip install "diffkern[bench]"
    pytest benchmarks/ --benchmark-only -k "rms_norm and bfloat16"

A test is a backend of an op on a workload, such as "rms_norm-cpu-bfloat16-DiT-S/2 256x256": -k takes any words of that.
A wrong kernel fails and is not timed. `diffkern bench ops` says more: it times in turn with rivals and ceilings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffkern.bench import record
from diffkern.bench.shapes import model_of, workloads
from diffkern.op import OPS, Backend, Op, Sample
from diffkern.testing import check

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases() -> Iterator[Any]:
    for name, op in sorted(OPS.items()):
        for backend in op.all_backends():
            if backend.devices and DEVICE not in backend.devices:
                continue
            for kind, dtype in DTYPES.items():
                for sample in workloads(op, None, DEVICE, dtype):
                    yield pytest.param(op, backend, sample, id=f"{name}-{backend.name}-{kind}-{sample.name}")


@pytest.fixture(scope="session", name="machine")
def make_machine() -> dict[str, Any]:
    return {name: fact for name, fact in record.machine().items() if name not in ("date", "command")}


@pytest.mark.parametrize(("op", "backend", "sample"), list(cases()))
@torch.no_grad()
def test_op(op: Op, backend: Backend, sample: Sample, benchmark: Any, machine: dict[str, Any]) -> None:
    args = op.bind(*sample.args())
    if (reason := backend.why_not(args)) is not None:
        pytest.skip(reason)
    check(op, backend.name, args)

    def call() -> Any:
        result = backend(*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    call()  # compiles, packs weights, and fills caches
    benchmark.group = f"{op.name}, {sample.name}"
    benchmark(call)
    cost = op.count_cost(*args)
    benchmark.extra_info |= {"model": model_of(sample), "bytes": cost.bytes, "flops": cost.flops} | machine
    if benchmark.stats is not None:  # it is with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"GB/s": cost.bytes / seconds / 1e9, "GFLOP/s": cost.flops / seconds / 1e9}

"""Time every op on its workloads: each backend against what else there is, after a check that it is right.

    python benchmarks/bench_ops.py                      # everything, into benchmarks/results/<machine>/ops-<op>.json
    python benchmarks/bench_ops.py --op randn --dtype float32 --no-compile --no-record

Rivals, timed in turn so that all of them see the same machine: every backend that can run, the reference, what a user
would write today with torch's own generator ("torch"; of a gradient, autograd's way back), torch.compile of both, a
clone of as many bytes ("copy") and, for an op that multiplies, a matmul with a packed weight of as many operations
("matmul").
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import record
import torch
from plain import AUTOGRAD, PLAIN
from torch import Tensor
from tqdm import tqdm

import diffkern
from diffkern.op import OPS, Cost, Op
from diffkern.testing import check

Call = Callable[[], Any]
PRODUCTS = ("linear", "query_key_value", "conv2d", "attention")  # the ops whose floor is arithmetic
SIDE = 1024  # of the weight of the matmul that they are compared with


def rivals(op: Op, args: tuple[Any, ...], device: str, compiled: bool) -> dict[str, Call]:
    """The calls to compare, by name. A backend is here only if it agrees with the oracle."""
    calls: dict[str, Call] = {}
    for backend in op.backends:
        if backend.why_not(args) is None:
            check(op, backend.name, args)
            calls[backend.name] = lambda backend=backend: backend(*args)  # type: ignore[misc]
    calls["reference"] = lambda: op.reference(*args)
    if op.name in PLAIN:
        calls["torch"] = lambda: PLAIN[op.name](*args)
    if op.name in AUTOGRAD:
        calls["torch"] = AUTOGRAD[op.name](*args)
    if compiled:
        torch.compiler.reset()
        for name, function in (("reference", op.reference), ("torch", PLAIN.get(op.name))):
            if function is not None:
                quick = torch.compile(function, fullgraph=True)
                calls[f"{name}, compiled"] = lambda quick=quick: quick(*args)  # type: ignore[misc]
    cost = op.count_cost(*args)
    block = torch.ones(cost.bytes // 2, dtype=torch.uint8, device=device)
    calls["copy"] = block.clone
    if op.name in PRODUCTS:
        dtype = next(a.dtype for a in args if isinstance(a, Tensor))
        x, weight = (torch.randn(n, SIDE, device=device).to(dtype) for n in (-(-cost.flops // (2 * SIDE**2)), SIDE))
        calls["matmul"] = lambda: diffkern.linear(x, weight)
    return calls


def figures(times: list[float], cost: Cost, copy: list[float], matmul: list[float] | None) -> dict[str, Any]:
    spread = record.spread([t * 1e6 for t in times])
    found = {
        "us": spread,
        "GB/s": float(f"{cost.bytes / spread['median'] / 1e3:.3g}"),
        "of copy": record.ratio(copy, times)["median"],
    }
    if matmul is not None:
        found["GFLOP/s"] = float(f"{cost.flops / spread['median'] / 1e3:.3g}")
        found["of matmul"] = record.ratio(matmul, times)["median"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="only this op (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    work = [
        (OPS[name], dtype, sample)
        for name in options.op or sorted(OPS)
        for dtype in options.dtype or ("float32", "bfloat16")
        for sample in OPS[name].make_samples(options.device, getattr(torch, dtype))
        if sample.workload
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    refused = 0
    for op, dtype, sample in tqdm(work, disable=None):
        args = sample.args()
        cost = op.count_cost(*args)
        try:
            calls = rivals(op, args, options.device, not options.no_compile)
        except AssertionError as wrong:
            refused += 1
            tqdm.write(f"{op.name:16} {sample.name:34} {dtype:9} not timed: {wrong}")
            continue
        for call in calls.values():
            call()  # compiles, and fills caches
        times = record.interleave(calls, options.rounds, at_least=5e-3)
        timed = {name: figures(t, cost, times["copy"], times.get("matmul")) for name, t in times.items()}
        rows.setdefault(op.name, []).append(
            {
                "op": op.name,
                "sample": sample.name,
                "dtype": dtype,
                "bytes": cost.bytes,
                "flops": cost.flops,
                "times": timed,
            }
        )
        line = "   ".join(f"{name} {f['us']['median']:.0f} us ({f['of copy']:.2f})" for name, f in timed.items())
        tqdm.write(f"{op.name:16} {sample.name:34} {dtype:9} {line}")
    if not options.no_record:
        for name, found in rows.items():
            print(record.write(f"ops-{name}", options.device, found))
    raise SystemExit(1 if refused else 0)


if __name__ == "__main__":
    with torch.no_grad():  # not inference mode: copies of weights made in it are packed anew in every call
        main()

"""Time every op on its workloads: each backend against what else there is, after a check that it is right.

    python benchmarks/bench_ops.py                      # everything, into benchmarks/results/<machine>/ops.json
    python benchmarks/bench_ops.py --op randn --dtype float32 --no-compile --out -

Rivals, timed in turn so that all of them see the same machine: every backend that can run, the reference, what a user
would write today with torch's own generator ("torch"), torch.compile of both, and a clone of as many bytes ("copy").
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import diffkern
from diffkern.layout import per_sample
from diffkern.op import OPS, Op
from diffkern.testing import check

Call = Callable[[], Any]


def torch_randn(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> Tensor:
    return torch.randn(keys.shape[0], *shape, dtype=dtype, device=keys.device)


def torch_add_noise(x0: Tensor, t: Tensor, table: Tensor, keys: Tensor, draw: int, more: bool) -> tuple[Tensor, ...]:
    alpha, sigma = table[t].to(x0.dtype).unbind(-1)
    noise = torch.randn_like(x0)
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise, noise


def torch_reparameterize(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Tensor:
    return mean + torch.exp(logvar / 2) * torch.randn_like(mean)


def torch_group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


PLAIN: dict[str, Callable[..., Any]] = {
    "randn": torch_randn,
    "add_noise": torch_add_noise,
    "reparameterize": torch_reparameterize,
    "group_norm_silu": torch_group_norm_silu,
}


def rivals(op: Op, args: tuple[Any, ...], device: str, compiled: bool) -> dict[str, Call]:
    """The calls to compare, by name. A backend is here only if it agrees with the oracle."""
    calls: dict[str, Call] = {}
    for backend in op.backends:
        if backend.why_not(args) is None:
            check(op, backend.name, args)
            calls[backend.name] = lambda run=backend.run: run(*args)  # type: ignore[misc]
    calls["reference"] = lambda: op.reference(*args)
    if op.name in PLAIN:
        calls["torch"] = lambda: PLAIN[op.name](*args)
    if compiled:
        torch.compiler.reset()
        for name, function in (("reference", op.reference), ("torch", PLAIN.get(op.name))):
            if function is not None:
                quick = torch.compile(function, fullgraph=True)
                calls[f"{name}, compiled"] = lambda quick=quick: quick(*args)  # type: ignore[misc]
    block = torch.ones(op.count_cost(*args).bytes // 2, dtype=torch.uint8, device=device)  # type: ignore[misc]
    calls["copy"] = block.clone
    return calls


def seconds(call: Call, device: str, repeat: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def measure(calls: dict[str, Call], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times, in turn. A measurement repeats its call for about 5 ms."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(5e-3 / max(1e-7, min(seconds(call, device, 1) for _ in range(3)))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device, repeats[name]))
    return times


def figures(times: list[float], nbytes: int, copy: float) -> dict[str, float]:
    p20, median, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    return {
        "us": round(median * 1e6, 2),
        "us_p20": round(p20 * 1e6, 2),
        "us_p80": round(p80 * 1e6, 2),
        "GB/s": round(nbytes / median / 1e9, 2),
        "of_copy": round(copy / median, 3),
    }


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffkern": diffkern.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="only this op (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--out", help="the file to write, - for none (default: benchmarks/results/<machine>/ops.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine(options.device)
    kind = re.sub(r"[^a-z0-9]+", "-", f"{about['device']} {options.threads} threads".lower()).strip("-")
    out = Path(options.out or Path(__file__).parent / "results" / kind / "ops.json")

    work = [
        (OPS[name], dtype, sample)
        for name in options.op or sorted(OPS)
        for dtype in options.dtype or ("float32", "bfloat16")
        for sample in OPS[name].make_samples(options.device, getattr(torch, dtype))  # type: ignore[misc]
        if sample.workload
    ]
    rows = []
    for op, dtype, sample in tqdm(work, disable=None):
        args = sample.args()
        nbytes = op.count_cost(*args).bytes  # type: ignore[misc]
        times = measure(rivals(op, args, options.device, not options.no_compile), options.device, options.rounds)
        copy = statistics.median(times["copy"])
        timed = {name: figures(t, nbytes, copy) for name, t in times.items()}
        rows.append({"op": op.name, "sample": sample.name, "dtype": dtype, "bytes": nbytes, "times": timed})
        line = "   ".join(f"{name} {f['us']:.0f} us ({f['of_copy']:.2f})" for name, f in timed.items())
        tqdm.write(f"{op.name:16} {sample.name:34} {dtype:9} {line}")
    if options.out != "-":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()

"""Made-up records of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CPU = {"devices": {"cpu": "a CPU, 2 of 2 threads, AVX2"}, "threads": 2,
       "versions": {"torch": "2.13.0", "c++": "g++ 12.2 (/usr/bin/g++)"},
       "command": "diffkern bench ops", "commit": "abc1234", "date": "2026-11-27"}  # fmt: skip
GPU = {"devices": {"cpu": "a CPU, 16 of 16 threads, AMX", "cuda:0": "NVIDIA H200"}, "threads": 16,
       "versions": {"torch": "2.11.0+cu130"}}  # fmt: skip


def spread(median: float, p20: float | None = None, p80: float | None = None) -> dict[str, float]:
    """The median without noise, unless it is given."""
    return {"median": median, "p20": median if p20 is None else p20, "p80": median if p80 is None else p80}


def form(ms: float, times: dict[str, float] | float, against: str | None = None) -> dict[str, Any]:
    """A form of a network. times: how much faster than it diffkern is."""
    ratio = times if isinstance(times, dict) else spread(times)
    found = {"ms": spread(ms), "diffkern is faster by": ratio, "max delta": 0.01, "first call, seconds": 1.0,
             "later call, seconds": ms / 1e3, "peak memory, MB": 10}  # fmt: skip
    return found if against is None else {**found, "against": against}


def network(name: str, variants: dict[str, Any], refused: dict[str, str] | None = None) -> dict[str, Any]:
    return {"network": name, "what": "a UNet", "dtype": "bfloat16", "variants": variants, "refused": refused or {},
            "profile": {"diffkern_C::winograd": 0.3, "aten::addmm": 0.2, "a norm": 0.4}}  # fmt: skip


def figures(us: float, floor: float | None = None, **more: float) -> dict[str, Any]:
    """What was measured of a variant of an op."""
    found = {"us": spread(us), "GB/s": 8e4 / us, "of copy": 0.5, **more}
    return found if floor is None else {**found, "of floor": floor}


def workload(op: str, times: dict[str, Any], sample: str = "pictures", **more: Any) -> dict[str, Any]:
    return {"op": op, "sample": sample, "dtype": "bfloat16", "bytes": 80_000_000, "flops": 40_000_000, "times": times,
            **more}  # fmt: skip


def write(folder: Path, name: str, results: Any, machine: dict[str, Any] = CPU) -> Path:
    """The file of a record. name: "machine/ops-randn"."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}))
    return path

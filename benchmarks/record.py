"""What every benchmark shares: interleaved timing, the facts about the machine, and the record that is committed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffkern import doctor

RESULTS = Path(__file__).parent / "results"


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant in each round. Every round runs all of them in turn, so that a machine that slows down
    slows them all."""
    for run in variants.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return dict(zip(("median", "p20", "p80"), (float(f"{q:.4g}") for q in quantiles.tolist()), strict=True))


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster, paired round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure: versions, hardware, threads, commit and command."""
    facts = doctor.report()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "versions": facts["versions"],
        "devices": facts["devices"],
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python", *sys.argv]),
    }


def folder_name() -> str:
    """The results folder of this kind of machine."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else doctor.cpu_name()
    kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return kind if torch.cuda.is_available() else f"{kind}-{torch.get_num_threads()}-threads"


def write(name: str, results: Any) -> Path:
    """Write results/<machine>/<name>.json. Returns its path."""
    path = RESULTS / folder_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n", encoding="utf-8")
    return path

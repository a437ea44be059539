"""The CPUs that a benchmark runs on: as many as it has threads, each on a core of its own, and how fast they run."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

SYSTEM = Path("/sys/devices/system/cpu")


def keep_kernels() -> None:
    """Let oneDNN keep the kernels of all programs and sizes that this process and those that it starts will time. It
    keeps 1024 unless told otherwise, which many sizes outnumber, and many rivals: each call compiled its own again,
    half the time of one picture of emoji-32. oneDNN asks once, before it keeps the first; what the user says comes
    first."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Compute with so many threads, and keep this process and those that it starts on as many CPUs, where the system
    lets it, so that they do not wander. PyTorch starts its threads with the first work, which therefore comes inside.
    The process may use all of its CPUs again after it."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen(before, threads))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def chosen(allowed: set[int], threads: int) -> list[int]:
    """So many of the CPUs, or all: first one of each core, then those that share it."""

    def order(cpu: int) -> tuple[int, int]:
        return [other for other in _beside(cpu) if other in allowed].index(cpu), cpu

    return sorted(allowed, key=order)[:threads]


def _beside(cpu: int) -> list[int]:
    """The CPUs of its core, itself among them; it alone where the system does not say."""
    try:
        words = (SYSTEM / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return [cpu]
    found: list[int] = []
    for span in words.strip().split(","):  # such as 0,64 or 0-1
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found if cpu in found else [cpu]


def facts() -> dict[str, str]:
    """The CPUs in use, what governs their clock, and the clock now, each where the system says so."""
    found = {}
    if hasattr(os, "sched_getaffinity"):
        found["cpus"] = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
    with contextlib.suppress(OSError):
        found["governor"] = (SYSTEM / "cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    with contextlib.suppress(OSError):
        clocks = re.findall(r"^cpu MHz\s*: ([\d.]+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if clocks:
            found["MHz"] = f"{float(min(clocks, key=float)):.0f} to {float(max(clocks, key=float)):.0f}"
    return found

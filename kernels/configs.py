"""The launch shapes that were measured: `configs/sm_<architecture>.json`, as benchmarks/tune.py writes them.

A pure lookup: nothing is timed here, so the first call costs what the hundredth does and a CUDA graph can be captured
at any time. An entry is found by the kernel and by facts of the call, such as the numbers of a head; lengths count in
buckets that end at powers of two. What has no entry, and a GPU that has no file, gets the kernel's own default. The
batch is no fact: a sample's result must not depend on it.
"""

import contextlib
import contextvars
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FOLDER = Path(__file__).parent / "configs"
_LONGEST = 4096  # lengths above it are one bucket
_SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}  # KB that a program can have; 99 elsewhere

Shape = dict[str, int]
"""A kernel's compile-time shape by name, with num_warps and num_stages."""

CUDA = "CUDA"
"""What the shape of a kernel in CUDA has, and no other: its block."""


class Tuned(NamedTuple):
    """An entry: the fastest shape, and the microseconds that it and PyTorch's own took where it was measured. Where the
    op has a kernel in CUDA too: those of its fastest block, and which that is."""

    shape: Shape
    us: float
    torch_us: float
    cuda_us: float = math.inf
    cuda_block: int | None = None


_trial: contextvars.ContextVar[Callable[[str, str], Shape | None] | None] = contextvars.ContextVar(
    "diffkern_trial", default=None
)


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability, 90 for 9.0; 80 for a device that only stands in for a GPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_memory(arch: int) -> int:
    """Bytes of shared memory that a program can have."""
    return _SHARED.get(arch, 99) * 1024


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def bucket(length: int) -> int:
    """The length that stands for this one in a table: the next power of two, at least 16."""
    return min(_LONGEST, max(16, power_of_2(length)))


def key(**facts: int) -> str:
    """How a table writes what an entry is for."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


@functools.cache
def _table(arch: int) -> dict[str, dict[str, Any]]:
    path = _FOLDER / f"sm_{arch}.json"
    return json.loads(path.read_text("utf-8"))["kernels"] if path.exists() else {}


@functools.cache
def is_tuned(kernel: str, arch: int) -> bool:
    """Whether a table has entries for the kernel: where it has none, no call needs to be told apart from others."""
    return bool(_table(arch).get(kernel))


def tuned(kernel: str, key: str, arch: int) -> Tuned | None:
    """The entry of a table, or None."""
    entry = _table(arch).get(kernel, {}).get(key)
    return None if entry is None else Tuned(**entry)


def on_trial(kernel: str, key: Callable[[], str]) -> Shape | None:
    """The shape that `trying` wants for this call, or None."""
    trial = _trial.get()
    return None if trial is None else trial(kernel, key())


@contextlib.contextmanager
def trying(choose: Callable[[str, str], Shape | None]) -> Iterator[None]:
    """Inside the block a kernel is launched in the shape `choose(kernel, key)`, unless that is None."""
    token = _trial.set(choose)
    try:
        yield
    finally:
        _trial.reset(token)

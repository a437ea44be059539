"""How much memory a call needs beyond its arguments, at its peak: its results and all that it makes on the way.

On a GPU PyTorch's allocator counts. On Linux the kernel does: what malloc keeps is given back first, and the highest
number of resident bytes is set back to the present one (proc(5), clear_refs). It counts pages, in batches, so that less
than some 100 kB says nothing."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMES = 3
PROC = Path("/proc/self")


def peak_mb(call: Callable[[], Any], device: str) -> float | None:
    """MB, of 10^6 bytes, to a tenth, that a call needs: the least of a few, since what else happens in the process adds
    to it. None where nobody counts them. The caller has run it once already."""
    count = _on_gpu if device == "cuda" else _on_linux
    found = [count(call) for _ in range(TIMES)]
    if None in found:
        return None
    return round(max(0, min(n for n in found if n is not None)) / 1e6, 1)


def _on_gpu(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _on_linux(call: Callable[[], Any]) -> int | None:
    trim = _malloc_trim()
    if trim is None:
        return None
    try:
        trim(0)
        (PROC / "clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except OSError:
        return None


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, TypeError, AttributeError):
        return None


def _status(name: str) -> int:
    """Bytes. Raises OSError where they are not counted."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", (PROC / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024

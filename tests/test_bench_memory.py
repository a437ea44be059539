"""The memory that a call needs at its peak, as the kernel and PyTorch's allocator count it."""

from __future__ import annotations

import pytest
import torch

from diffkern.bench import memory

linux = pytest.mark.skipif(memory._malloc_trim() is None or not memory.PROC.exists(), reason="needs Linux and glibc")
NUMBERS = 16_000_000  # 64 MB of float32


@linux
@pytest.mark.parametrize("kept", [NUMBERS, 1], ids=["its result", "made on the way"])
def test_what_a_call_touches_is_counted(kept):
    def call() -> torch.Tensor:
        return torch.full((NUMBERS,), 1.0)[:kept].clone() if kept == 1 else torch.full((NUMBERS,), 1.0)

    call()
    assert memory.peak_mb(call, "cpu") == pytest.approx(64, rel=0.1)


@linux
def test_what_is_there_before_is_not_counted():
    x = torch.full((NUMBERS,), 1.0)
    assert memory.peak_mb(lambda: x.add_(1), "cpu") == pytest.approx(0, abs=3)


def test_where_nobody_counts_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path / "none")
    assert memory.peak_mb(lambda: torch.ones(4), "cpu") is None
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    assert memory.peak_mb(lambda: torch.ones(4), "cpu") is None


def test_on_a_gpu_the_allocator_counts(monkeypatch):
    held = {"now": 1_000_000, "peak": 900_000_000}

    def call() -> None:
        held["peak"] = max(held["peak"], held["now"] + 64_000_000)
        held["now"] += 1_000_000  # a result that is kept

    for name, stand_in in {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: held.update(peak=held["now"]),
        "memory_allocated": lambda: held["now"],
        "max_memory_allocated": lambda: held["peak"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert memory.peak_mb(call, "cuda") == 64.0
    assert held["now"] == 1_000_000 * (1 + memory.TIMES)

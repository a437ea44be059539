"""What a call of an op ends with on a backend, right or wrong, and whether that is the reference's answer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from diffkern.available import availability
from diffkern.backend import BackendError, use_backend
from diffkern.op import OPS, Op
from diffkern.testing import judge, poison, tensors, widened

BACKENDS = ("auto", "cpu", "torch")
INTERPRETED = () if torch.cuda.is_available() or availability("triton") is not None else ("triton",)
# What a wrong call may end with: torch's own are RuntimeError, IndexError and NotImplementedError.
CLEAR = (ValueError, TypeError, RuntimeError, IndexError, OverflowError, BackendError)
UNCLEAR = ("INTERNAL ASSERT", "std::", "basic_string", "vector::", "bad_alloc", "Exception raised from", "Traceback")
LARGEST = 1 << 14  # elements of a call's largest tensor: more calls say more than larger ones


@functools.cache
def calls(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    small = [OPS[name].bind(*s.args()) for s in OPS[name].make_samples("cpu", dtype) if not s.workload]
    return [args for args in small if max(sizes(args)) <= LARGEST]


def sizes(args: tuple[Any, ...]) -> list[int]:
    return [a.numel() for a in args if isinstance(a, Tensor)]


def attempt(op: Op, backend: str, args: tuple[Any, ...]) -> tuple[Tensor, ...] | Exception:
    """The results of a call, or the clear error that it ended with."""
    poison("cpu")
    try:
        with use_backend(backend):
            return tensors(op.overload(*op.bind(*args)))
    except CLEAR as e:
        error = e
    message = str(error)
    assert message, f"{type(error).__name__} says nothing"
    assert not any(word in message for word in UNCLEAR), message
    return error


def nearby(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call in float64, with every number moved by a unit in the last place that it had."""

    def moved(a: Any, wide: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.layout != torch.strided:
            return wide
        sign = torch.arange(a.numel()).reshape(a.shape) % 3 - 1
        return wide * (1 + sign * torch.finfo(a.dtype).eps)

    return tuple(map(moved, args, widened(args)))


def compare(
    op: Op, backend: str, args: tuple[Any, ...], got: tuple[Tensor, ...], plain: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
) -> None:  # fmt: skip
    if any(p.is_meta or not p.is_floating_point() for p in plain):
        assert [(g.shape, g.dtype, g.device) for g in got] == [(p.shape, p.dtype, p.device) for p in plain]
        return
    if op.name == "conv2d" and not args[1].isfinite().all():
        return  # times the zeros of the padding: NaN, or left out as it pleases the library
    if backend == "torch":  # whose attention takes some NaN for zero: it is not ours
        got = tuple(torch.where(e.isfinite() | ~g.isfinite(), g, torch.nan) for g, e in zip(got, exact, strict=True))
    try:
        # Twice the usual: among thousands of calls the reference is lucky in some.
        judge(f"{op.name} on {backend}", got, plain, exact, times=4)
    except AssertionError:
        # Or what is asked for hangs on the last digits of the arguments, as a norm of equal numbers does.
        moved = attempt(op, "reference", nearby(args))
        if isinstance(moved, Exception):
            raise
        moved = tuple(m.to(p.dtype) for m, p in zip(moved, plain, strict=True))
        judge(f"{op.name} on {backend}", got, moved, exact, times=8)

"""Every op on calls that nobody should make: the reference's answer or one clear error, on every backend, and nothing
else: no crash, no hang, no other number, no argument changed.

    DIFFKERN_FUZZ=5000 python -m pytest tests/test_fuzz.py      5000 calls of each op and dtype instead of a few
"""

from __future__ import annotations

import faulthandler
import os
import random
from typing import Any

import pytest
import torch
from answers import BACKENDS, INTERPRETED, attempt, calls, compare, sizes
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from mutations import mutate, others_of, rearrange
from torch import Tensor

from diffkern.available import availability
from diffkern.backend import BackendError
from diffkern.op import OPS, Op
from diffkern.testing import widened

CALLS = int(os.environ.get("DIFFKERN_FUZZ", "0"))
# The same calls in every run, unless a number of them is asked for: then others every time.
FUZZ = settings(
    max_examples=CALLS or 40,
    derandomize=not CALLS,
    database=None,
    deadline=None,
    phases=(Phase.generate,),  # a seed does not get simpler
    suppress_health_check=list(HealthCheck),
)
HANG = 120  # s


def describe(args: tuple[Any, ...]) -> str:
    def one(a: Any) -> str:
        if not isinstance(a, Tensor):
            return repr(a)[:60]
        layout = tuple(a.stride()) if a.layout == torch.strided else a.layout
        return f"{a.dtype} {list(a.shape)} {layout} on {a.device}"

    return "; ".join(map(one, args))


def try_all(op: Op, args: tuple[Any, ...]) -> None:
    note(describe(args))
    before = [a.clone() if isinstance(a, Tensor) and a.device.type == "cpu" else a for a in args]
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        plain, exact = (attempt(op, "reference", a) for a in (args, widened(args)))
        for backend in BACKENDS:
            if backend != "auto" and availability(backend) is not None:
                continue
            got = attempt(op, backend, args)
            if isinstance(got, Exception):
                continue  # a kernel may refuse what broadcasts
            assert not isinstance(exact, Exception), f"{backend} answers where the reference says: {exact}"
            # A library may refuse the reference's float32.
            compare(op, backend, args, got, got if isinstance(plain, Exception) else plain, exact)
    finally:
        faulthandler.cancel_dump_traceback_later()
    for a, b in zip(args, before, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and b.device.type == "cpu" and b.layout == torch.strided:
            assert torch.allclose(a, b, 0, 0, equal_nan=not a.is_complex()), "an argument was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_an_answer_or_a_clear_error(op, dtype):
    @FUZZ
    @given(st.integers(0, (1 << 64) - 1))
    def each(seed: int) -> None:
        r = random.Random(seed)
        try_all(op, mutate(r.choice(calls(op.name, dtype)), r))

    with torch.no_grad():
        each()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_interpreted_triton_reads_what_fits_together(op):
    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    r, small = random.Random(0), sorted(calls(op.name, torch.float32), key=lambda args: sum(sizes(args)))[:8]
    with torch.no_grad():
        for _ in range(CALLS or 4):
            args = rearrange(r.choice(small), r)
            plain, exact = (attempt(op, "reference", a) for a in (args, widened(args)))
            if not isinstance(plain, Exception) and not isinstance(exact, Exception):
                got = attempt(op, "triton", args)
                if not isinstance(got, Exception):
                    compare(op, "triton", args, got, plain, exact)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_interpreted_triton_reads_nothing_that_does_not_fit(op):
    """Its launchers trust every size: the op has asked before. Each tensor in turn has another size or another axis."""
    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    full = max(
        calls(op.name, torch.float32), key=lambda args: (min(sizes(args)) > 0, len(sizes(args)), -sum(sizes(args)))
    )
    refused = 0
    with torch.no_grad():
        for i, a in enumerate(full):
            if not isinstance(a, Tensor):
                continue
            for other in others_of(a):
                args = (*full[:i], other, *full[i + 1 :])
                plain, got = (attempt(op, backend, args) for backend in ("reference", "triton"))
                if isinstance(plain, Exception):
                    assert str(plain).startswith(f"diffkern::{op.name}: "), plain
                    assert isinstance(got, BackendError) or str(got) == str(plain)
                    refused += 1
                elif not isinstance(got, BackendError):
                    exact = attempt(op, "reference", widened(args))
                    assert not isinstance(got, Exception)
                    assert not isinstance(exact, Exception)
                    compare(op, "triton", args, got, plain, exact)
    assert refused > 2 * len(sizes(full)) - 2

"""Every op on calls that nobody should make: the reference's answer or one clear error, on every backend, and nothing
else: no crash, no hang, no other number, no argument changed.

    DIFFKERN_FUZZ=5000 python -m pytest tests/test_fuzz.py      5000 calls of each op and dtype instead of a few
"""

from __future__ import annotations

import faulthandler
import functools
import os
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from mutations import mutate, others_of, rearrange
from rows import LOOKUPS, check_rows_outside, wild_calls
from torch import Tensor

from diffkern.available import availability
from diffkern.backend import BackendError, use_backend
from diffkern.op import OPS, Op
from diffkern.testing import judge, oracle, poison, tensors, widened

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
BACKENDS = ("auto", "cpu", "torch")
INTERPRETED = () if torch.cuda.is_available() or availability("triton") is not None else ("triton",)
# What a wrong call may end with: torch's own are RuntimeError, IndexError and NotImplementedError.
CLEAR = (ValueError, TypeError, RuntimeError, IndexError, OverflowError, BackendError)
UNCLEAR = ("INTERNAL ASSERT", "std::", "basic_string", "vector::", "bad_alloc", "Exception raised from", "Traceback")
LARGEST = 1 << 14  # elements of a call's largest tensor: more calls say more than larger ones
HANG = 120  # s


@functools.cache
def calls(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    small = [OPS[name].bind(*s.args()) for s in OPS[name].make_samples("cpu", dtype) if not s.workload]
    return [args for args in small if max(sizes(args)) <= LARGEST]


def sizes(args: tuple[Any, ...]) -> list[int]:
    return [a.numel() for a in args if isinstance(a, Tensor)]


def describe(args: tuple[Any, ...]) -> str:
    def one(a: Any) -> str:
        if not isinstance(a, Tensor):
            return repr(a)[:60]
        layout = tuple(a.stride()) if a.layout == torch.strided else a.layout
        return f"{a.dtype} {list(a.shape)} {layout} on {a.device}"

    return "; ".join(map(one, args))


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


# What was found, and is mended.

R = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=R)


def every_backend(op: Op, *args: Any) -> None:
    """The answer of each that takes the call."""
    bound = op.bind(*args)
    for backend in ("reference", *BACKENDS, *INTERPRETED):
        got = attempt(op, backend, bound)
        if isinstance(got, Exception):
            assert "was forced but" in str(got), got
        else:
            judge(f"{op.name} on {backend}", got, tensors(op.reference(*bound)), oracle(op, bound), times=4)


@pytest.mark.parametrize("bias", [normal(12, 2)[:, 0], normal(1).expand(12), normal(24)[::2]], ids=["2", "0", "2 too"])
def test_a_bias_may_have_any_stride(bias):
    """oneDNN took the numbers that lie side by side in memory."""
    every_backend(OPS["linear"], normal(3, 6, 20), normal(12, 20), bias)
    every_backend(OPS["conv2d"], normal(2, 4, 5, 5), normal(12, 4, 3, 3), bias)
    every_backend(OPS["conv2d"], normal(2, 4, 5, 5), normal(12, 4, 1, 1), bias, 1, None, None, normal(2, 12, 5, 5))
    every_backend(OPS["query_key_value"], normal(3, 20), *[normal(12, 20) for _ in "qkv"], bias, bias, bias)


@pytest.mark.parametrize("name", ["linear", "conv2d", "query_key_value"])
def test_other_dtypes_beside_x_do_not_change_the_results(name):
    """PyTorch's own kernels promoted it to the widest of them."""
    x, weight = (normal(2, 6, 3, 3), normal(4, 6, 1, 1)) if name == "conv2d" else (normal(2, 6), normal(4, 6))
    weights = [weight.bfloat16()] * (3 if name == "query_key_value" else 1)
    assert OPS[name](x.bfloat16(), *weights, *[normal(4) for _ in weights]).dtype == torch.bfloat16


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_no_tensor_is_none_or_elsewhere(op):
    """A schema takes None for any tensor; and beside a meta tensor PyTorch made results of memory that nobody wrote."""
    args = calls(op.name, torch.float32)[0]
    for i in op.required:
        with pytest.raises(TypeError, match=f"^{op.name}: {list(op.positions)[i]} must be a tensor, got None$"):
            op(*args[:i], None, *args[i + 1 :])
        if len(op.required) > 1:
            with pytest.raises(ValueError, match="the tensors must be on one device, got cpu and meta"):
                op(*args[:i], args[i].to("meta"), *args[i + 1 :])


@pytest.mark.parametrize("name", LOOKUPS)
def test_only_rows_that_there_are_are_looked_up(name):
    """The reference took the last row for -1, and the kernels for GPUs the nearest."""
    op, at = OPS[name], LOOKUPS[name][1]
    check_rows_outside(name, lambda *args: tensors(op.reference(*args)), "cpu")
    for _, wild in wild_calls(name, "cpu", torch.float32):
        for args in wild:
            allowed = len(args[LOOKUPS[name][0]]) - LOOKUPS[name][2] - 1
            sentence = rf"{list(op.positions)[at]}\[1\] is {args[at][1]}, allowed are 0 to {allowed}$"
            for backend in ("reference", "auto", "cpu", *INTERPRETED):
                if availability(backend) is None:
                    with use_backend(backend), pytest.raises(RuntimeError, match=f"^diffkern::{name}: {sentence}"):
                        op(*args)
            x = args[0].clone().requires_grad_()  # training asks too
            with pytest.raises(RuntimeError, match=sentence):
                op(x, *args[1:])


def test_heads_without_numbers_or_keys():
    """One divided by zero, one was not contiguous."""
    nothing = OPS["attention"].bind(*[normal(2, 4, 2, 0)] * 3)
    assert OPS["attention"].reference(*nothing).shape == (2, 4, 0)
    assert all(isinstance(attempt(OPS["attention"], b, nothing), (tuple, RuntimeError)) for b in BACKENDS)
    q, k = normal(2, 3, 2, 1), normal(2, 0, 2, 1)
    assert OPS["attention"].reference(q, k, k).is_contiguous()
    every_backend(OPS["attention"], q, k, k)


@pytest.mark.parametrize("heads", [(0, 2), (2, 0)], ids=str)
def test_queries_or_keys_alone(heads):
    """Without queries the Triton kernel gave keys of memory that nobody had written to."""
    q, k = (normal(2, 3, n, 4) for n in heads)
    every_backend(OPS["qk_norm_rope"], q, k, normal(4), normal(4), normal(3, 4), normal(3, 4))


def test_sizes_that_no_memory_has():
    """They wrapped around, or filled the memory before they were refused."""
    keys = torch.zeros(0, 2, dtype=torch.int64)
    for shape in ([1 << 32, 1 << 32], [1 << 62, 4]):
        assert isinstance(attempt(OPS["randn"], "auto", OPS["randn"].bind(keys, shape)), RuntimeError)
    for dim in (1 << 45, (1 << 62) + 1):
        call = OPS["timestep_embedding"].bind(normal(3), dim)
        assert isinstance(attempt(OPS["timestep_embedding"], "auto", call), RuntimeError)


def test_an_offset_at_the_end_of_its_numbers():
    """The C++ kernel's sums wrapped around: it gave back what was in memory."""
    keys = torch.arange(4).reshape(2, 2)
    for offset in ((1 << 62) + 1, (1 << 63) - 1):
        call = (keys, [37], 0, torch.float32, offset)
        assert torch.equal(OPS["randn"](*call), OPS["randn"].reference(*call))
    with use_backend("reference"), pytest.raises(RuntimeError, match="offset is -1, allowed are 0 and above"):
        OPS["randn"](keys, [3], 0, torch.float32, -1)


@pytest.mark.parametrize("period", [-1.0, 0.0])
def test_a_period_is_above_zero(period):
    """It was NaN for every time."""
    for backend in ("reference", "auto"):
        call = OPS["timestep_embedding"].bind(normal(3), 8, True, 0.0, period)
        assert isinstance(attempt(OPS["timestep_embedding"], backend, call), (ValueError, RuntimeError))

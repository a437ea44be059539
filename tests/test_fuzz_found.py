"""What test_fuzz.py found, and is mended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from answers import BACKENDS, INTERPRETED, attempt, calls
from rows import LOOKUPS, check_rows_outside, wild_calls
from torch import Tensor

from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.op import OPS, Op
from diffkern.testing import judge, oracle, tensors

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

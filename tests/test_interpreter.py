"""The patched interpreter casts as torch does, and refuses arithmetic that the plain one does on raw bits."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton kernels are compiled here, not interpreted", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy(out, x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(tl.float32).to(out.dtype.element_ty))


@triton.jit
def _double(out, x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def _compare(out, x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i) < tl.load(x + i))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_are_torchs(dtype):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-6, 448.0, 65504.0, 3e38])
    values = torch.cat([special, torch.randn(1014, generator=torch.Generator().manual_seed(0)) * 8])
    narrow, wide = torch.empty(1024, dtype=dtype), torch.empty(1024)
    _copy[(1,)](narrow, values, SIZE=1024)
    expected = values.to(dtype)
    assert torch.equal(narrow.float().nan_to_num(7e37), expected.float().nan_to_num(7e37))
    _copy[(1,)](wide, expected, SIZE=1024)
    assert torch.equal(wide.nan_to_num(7e37), expected.float().nan_to_num(7e37))


@pytest.mark.parametrize("kernel", [_double, _compare])
def test_arithmetic_on_raw_bits_raises(kernel):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="RawArithmeticError"):
        kernel[(1,)](torch.empty_like(x), x, SIZE=16)

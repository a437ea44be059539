"""The norms of rows on a CPU, where their kernels could go wrong: at the ends of rows, among numbers too small for the
instructions that take bfloat16, and where the mean hides the spread."""

from __future__ import annotations

import pytest
import torch

from diffkern.available import availability
from diffkern.op import OPS
from diffkern.testing import check, make

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around one and two registers of 8 or 16 numbers, and four pairs of them.
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 161, 1024, 1025)

pytestmark = pytest.mark.skipif(availability("cpu") is not None, reason=str(availability("cpu")))


def layer_norm(x):
    shift, scale, weight, bias = (make((1, x.shape[-1]), "cpu", x.dtype, seed=s) for s in range(1, 5))
    return "layer_norm_modulate", (x, shift, scale, weight[0], bias[0], 1e-6)


def rms_norm(x):
    return "rms_norm", (x, make(x.shape[-1:], "cpu", x.dtype, seed=1), 1e-6)


def gated(x):
    parameters = (make((1, x.shape[-1]), "cpu", x.dtype, seed=s) for s in range(1, 4))
    return "gate_residual_norm_modulate", (x, make(x.shape, "cpu", x.dtype, seed=4), *parameters, None, None, 1e-6)


def heads(x):
    q, weight = x[:, :, None], make(x.shape[-1:], "cpu", x.dtype, seed=1)
    return "qk_norm_rope", (q, q.flip(1), weight, weight, None, None, True, 1e-6)


CALLS = (layer_norm, rms_norm, gated, heads)


def agrees(call, x):
    name, args = call(x)
    check(OPS[name], "cpu", args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_rows_of_any_length(call, dtype):
    for length in LENGTHS:
        agrees(call, make((1, 7, length), "cpu", dtype))  # some rows together and some that are left


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [3.0, 7.0, 9.0, 100.0])
def test_a_mean_beyond_the_spread(mean, dtype):
    """In bfloat16 the squares about the mean come from those about zero up to a mean of eight times the spread."""
    for length in (64, 200):
        agrees(layer_norm, make((1, 6, length), "cpu", dtype) + mean)


def test_a_spread_below_the_last_place_of_the_squares():
    """Of a very long row the squares about zero, summed in float32, round by more than those about the mean are."""
    x = torch.full((1, 1, 1 << 20), 256.0, dtype=torch.bfloat16)
    x[..., :4] = 260.0
    check(OPS["layer_norm_modulate"], "cpu", (x, None, None, None, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_zeros_and_equal_numbers(call, dtype):
    x = make((1, 6, 80), "cpu", dtype)
    x[:, 1], x[:, 2], x[:, 3, ::3], x[:, 4, 5:] = 0, 1.5, 0, 0
    agrees(call, x)


@pytest.mark.parametrize("size", [1e-19, 1e-22, 1e-37, 1e-39])
def test_numbers_whose_squares_are_subnormal(size):
    x = (make((1, 6, 80), "cpu", torch.float32) * size).bfloat16()
    check(OPS["rms_norm"], "cpu", (x, None, 1e-6))
    check(OPS["layer_norm_modulate"], "cpu", (x, None, None, None, None, 1e-6))
    if size > 1e-20:  # the reference's own float32 squares are zero below
        check(OPS["rms_norm"], "cpu", (x, None, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_below_the_normal_numbers(dtype):
    """They are rounded like all others, where AVX512_BF16's instruction makes zeros of them."""
    x = make((1, 6, 80), "cpu", dtype)
    weight = torch.logspace(-41, -36, 80).to(dtype)
    expected = OPS["rms_norm"].reference(x, weight, 1e-6)
    assert (expected.abs() < torch.finfo(dtype).tiny).sum() > 100
    error = (OPS["rms_norm"](x, weight, 1e-6).double() - expected.double()).abs()
    assert (error <= expected.double().abs() * 2**-7 + 2.0**-133).all()

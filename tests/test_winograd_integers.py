"""Winograd's convolutions with points of 16-bit integers: how much counting rounds, and that no sum overflows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern import winograd
from diffkern.available import availability
from diffkern.testing import make
from diffkern.winograd import Tile

pytestmark = pytest.mark.skipif(availability("cpu") is not None, reason="a kernel of the cpu backend")
either = pytest.mark.parametrize("upsample", [False, True])


def convolve(x: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    x, one = x.contiguous(memory_format=torch.channels_last), (1, 1, 1, 1)
    return winograd.convolve(x, weight, None, one, None, None, False, upsample, Tile(4, integers=True))


def exact(x: Tensor, weight: Tensor, upsample: bool) -> Tensor:
    big = F.interpolate(x.float(), scale_factor=2.0) if upsample else x
    return F.conv2d(big.double(), weight.double(), padding=1)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@either
@pytest.mark.parametrize("far", [1, 30])
@pytest.mark.parametrize("channels", [33, 320, 1280])
def test_counting_makes_half_the_error_of_rounding_to_bfloat16(channels, far, upsample):
    """Of activations, as they come out of a SiLU, of which every 61st channel may be far larger: 1.66 thousandths of
    the result's root mean square are what rounding makes, 0.53 to 0.76 and doubled 0.66 to 1.02 what counting does."""
    x = F.silu(make((2, channels, 9, 12), "cpu", torch.float32))
    x[:, ::61] *= far
    x = x.bfloat16()
    weight = (make((40, channels, 3, 3), "cpu", torch.float32, seed=1) / (9 * channels) ** 0.5).bfloat16()
    expected = exact(x, weight, upsample)
    error = convolve(x.float(), weight.float(), upsample) - expected
    assert 3e-4 < rms(error) / rms(expected) < (1.1e-3 if upsample else 8e-4)
    assert error.abs().max() / rms(expected) < (2.5e-2 if upsample else 1e-2)
    rounding, both = expected.bfloat16() - expected, convolve(x, weight, upsample) - expected
    assert rms(both) < (1.2 if upsample else 1.12) * rms(rounding)


@either
@pytest.mark.parametrize("channels", [16, 64, 200])
def test_the_largest_sums_fit(channels, upsample):
    """Of equal numbers all are counted as the most there may be, and all products of a chain have one sign: their sum
    is 0.9998 of 2^31."""
    for sign in (1, -1):
        x, weight = torch.ones(1, channels, 6, 7), torch.full((33, channels, 3, 3), 0.37 * sign)
        expected = exact(x, weight, upsample)
        error = (convolve(x, weight, upsample) - expected).abs() / expected.abs().amax()
        assert error.max() < 1e-3


@either
def test_every_number_of_a_kernel_is_at_its_place(upsample):
    """Result 9 c + k is channel 64 + c as seen by the k-th number alone; of an odd number of channels the last pair has
    one."""
    x = make((2, 67, 6, 9), "cpu", torch.float32)
    x[:, :64] = 0  # channels are counted in units of the largest of 64
    weight = torch.zeros(27, 67, 3, 3)
    for i in range(27):
        weight[i, 64 + i // 9, i % 9 // 3, i % 3] = 1
    expected = exact(x, weight, upsample)
    error = (convolve(x, weight, upsample) - expected).abs().amax(dim=(0, 2, 3)) / rms(expected)
    assert error.max() < 5e-3


@either
def test_units_follow_what_is_counted(upsample):
    """Samples, tiles and results a trillion times as large as their neighbours take nothing from those."""
    x, weight = make((2, 48, 8, 8), "cpu", torch.float32), make((3, 48, 3, 3), "cpu", torch.float32, seed=1)
    expected = convolve(x, weight, upsample)
    scales = torch.tensor([1.0, 2.0**40])
    got = convolve(
        x * scales.view(2, 1, 1, 1), weight * torch.tensor([1.0, 2.0**-40, 2.0**40]).view(3, 1, 1, 1), upsample
    )
    assert torch.equal(got[0, 0], expected[0, 0])
    assert torch.equal(got[1, 0], expected[1, 0] * 2.0**40)
    assert torch.equal(got[0, 1], expected[0, 1] * 2.0**-40)
    assert torch.equal(got[1, 2], expected[1, 2] * 2.0**80)


def test_nothing_and_next_to_nothing_are_counted_as_zero():
    x, weight = make((1, 32, 8, 8), "cpu", torch.float32), make((32, 32, 3, 3), "cpu", torch.float32, seed=1)
    for a, b in ((x * 0, weight), (x, weight * 0), (x * 1e-38, weight), (x * 1e-42, weight)):
        assert convolve(a, b, False).abs().max() < 1e-30


@either
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 40, 65])
def test_a_weight_that_is_not_finite_is_seen_in_its_result_alone(channel, value, upsample):
    """Whichever chain of channels it is in: the units of a result are measured chain by chain."""
    x, weight = make((1, 70, 8, 8), "cpu", torch.float32), make((33, 70, 3, 3), "cpu", torch.float32, seed=1)
    expected = convolve(x, weight, upsample)
    weight[5, channel, 1, 1] = value
    got = convolve(x, weight, upsample)
    assert not got[:, 5].isfinite().any()
    others = [i for i in range(33) if i != 5]
    assert torch.equal(got[:, others], expected[:, others])

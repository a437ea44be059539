"""Winograd's convolutions: exact where arithmetic is, as near as oneDNN where it is not, and taken where they pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import diffkern
from diffkern import packing, winograd
from diffkern.op import availability, use_backend
from diffkern.testing import make

pytestmark = [
    pytest.mark.skipif(availability("cpu") is not None, reason="a kernel of the cpu backend"),
    pytest.mark.skipif(not winograd._measured(), reason="not chosen on this kind of CPU"),
]
ONE = (1, 1, 1, 1)


@pytest.fixture(autouse=True)
def cpu():
    with torch.no_grad(), use_backend("cpu"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The calls of Winograd's kernel."""
    made, convolve = [], winograd.convolve

    def counted(*args):
        made.append(args)
        return convolve(*args)

    monkeypatch.setattr(winograd, "convolve", counted)
    return made


def test_the_samples_named_for_it_take_it(calls):
    samples = [s for s in diffkern.conv2d.make_samples("cpu", torch.float32) if "Winograd" in s.name]
    for sample in samples:
        diffkern.conv2d(*sample.args())
    assert len(calls) == len(samples) > 6
    diffkern.conv2d(make((2, 64, 8, 8), "cpu", torch.float32), make((64, 64, 3, 3), "cpu", torch.float32), None, 2)
    diffkern.conv2d(make((2, 64, 8, 8), "cpu", torch.float32), make((64, 64, 1, 1), "cpu", torch.float32))
    assert len(calls) == len(samples)


def integers(*shape: int, most: int, seed: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize(("channels", "results", "height", "width"), [(64, 64, 8, 8), (200, 131, 5, 11), (35, 5, 7, 4)])
def test_integers_come_out_exactly(channels, results, height, width, upsample):
    """Of multiples of 4 all halves and quarters on the way are integers, and all sums below 2^24."""
    x = integers(5, channels, height, width, most=4, seed=0).contiguous(memory_format=torch.channels_last)
    weight = 4 * integers(results, channels, 3, 3, most=3, seed=1)
    bias, add = integers(results, most=9, seed=2), integers(5, results, most=9, seed=3)
    got = winograd.convolve(x, weight, bias, ONE, add, None, False, upsample)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    exact = F.conv2d(big.double(), weight.double(), bias.double(), padding=1) + add.double()[:, :, None, None]
    assert torch.equal(got.double(), exact)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("channels", [64, 320, 1280])
def test_error_is_at_most_twice_that_of_the_definition(channels, upsample):
    x = make((1, channels, 8, 8), "cpu", torch.float32, "channels_last")
    weight = make((64, channels, 3, 3), "cpu", torch.float32, seed=1) / (9 * channels) ** 0.5
    got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    exact = F.conv2d(big.double(), weight.double(), padding=1)
    own, error = F.conv2d(big, weight, padding=1).double() - exact, got.double() - exact
    assert error.square().mean() <= 4 * own.square().mean()
    assert error.abs().max() <= 2 * own.abs().max()


@pytest.mark.parametrize("upsample", [False, True])
def test_threads_and_neighbours_change_no_bit(upsample):
    """Blocks of tiles reach over samples, and are of another size for another number of threads."""
    x = make((5, 48, 11, 10), "cpu", torch.float32, "channels_last")
    weight, threads = make((72, 48, 3, 3), "cpu", torch.float32, seed=1), torch.get_num_threads()

    def run(x: torch.Tensor, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return winograd.convolve(x, weight, None, ONE, None, None, False, upsample)

    try:
        one, two, five = (run(x, n) for n in (1, 2, 5))
        alone = torch.cat([run(x[i : i + 1], 2) for i in range(5)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.equal(one, five)
    assert torch.equal(one, alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("upsample", [False, True])
def test_what_is_not_finite_stays_where_it_belongs(value, upsample):
    """Not a pixel more than those that see it, though a tile's patch is larger; infinity may turn into NaN."""
    weight = make((33, 40, 3, 3), "cpu", torch.float32, seed=1)
    for place in ((0, 0), (3, 4), (4, 3), (6, 5)):
        x = make((1, 40, 7, 6), "cpu", torch.float32, "channels_last")
        x[0, 7, place[0], place[1]] = value
        got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample)
        big = F.interpolate(x, scale_factor=2.0) if upsample else x
        assert torch.equal(got.isfinite(), F.conv2d(big, weight, padding=1).isfinite())


def test_one_copy_serves_all_sizes_of_pictures():
    before, weight = packing.kept_bytes(), make((64, 64, 3, 3), "cpu", torch.float32)
    for size in (8, 9, 16):
        diffkern.conv2d(make((1, 64, size, size), "cpu", torch.float32), weight)
    assert packing.kept_bytes() == before + 16 * 64 * 64 * 4
    diffkern.conv2d(make((1, 64, 8, 8), "cpu", torch.float32), weight, upsample=True)
    assert packing.kept_bytes() == before + (16 + 9) * 64 * 64 * 4


def test_the_kernel_refuses_what_does_not_fit():
    kernel, x = torch.ops.diffkern_C.winograd, make((2, 32, 6, 6), "cpu", torch.float32, "channels_last")
    weight = torch.ops.diffkern_C.winograd_weight(make((32, 32, 3, 3), "cpu", torch.float32), False)
    with pytest.raises(RuntimeError, match="packed for another shape"):
        kernel(x, weight, 64, ONE, None, None, False, None, False)
    with pytest.raises(RuntimeError, match="doubled picture must be 1"):
        kernel(x, weight, 32, (0, 1, 1, 1), None, None, False, None, True)
    with pytest.raises(RuntimeError, match="must be channels_last"):
        kernel(x.contiguous(), weight, 32, ONE, None, None, False, None, False)
    with pytest.raises(RuntimeError, match="residual must have"):
        kernel(x, weight, 32, ONE, None, None, False, x[:, :, 1:], False)
    with pytest.raises(RuntimeError, match=r"bias must be contiguous \[32\]"):
        kernel(x, weight, 32, ONE, torch.zeros(31), None, False, None, False)

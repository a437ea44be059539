"""Convolutions with few results, all taps of a pixel at once: exact, whatever is around a sample, and taken where they
pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from one_sample import assert_own_bits

import diffkern
from diffkern import packing, taps
from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.testing import make

pytestmark = [
    pytest.mark.skipif(availability("cpu") is not None, reason="a kernel of the cpu backend"),
    pytest.mark.skipif(packing.vectors() is None, reason="not chosen on this kind of CPU"),
]
ONE = (1, 1, 1, 1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def cpu():
    with torch.no_grad(), use_backend("cpu"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The pictures of the kernel's calls."""
    made, convolve = [], taps.convolve

    def counted(x, *args):
        made.append(len(x))
        return convolve(x, *args)

    monkeypatch.setattr(taps, "convolve", counted)
    return made


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("results", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("channels", "height", "width", "sides"),
    [
        (1, 1, 1, ONE),
        (2, 5, 12, ONE),  # a pair of channels, as many pixels as registers hold
        (35, 6, 25, ONE),
        (130, 2, 3, ONE),  # more than a block of words
        (7, 3, 4, (0, 0, 0, 0)),
        (5, 4, 3, (3, 0, 0, 4)),  # lines and pixels that see nothing
    ],
)
def test_integers_come_out_exactly(dtype, results, channels, height, width, sides):
    """All sums are below 2^24: in 16 bits they are rounded once."""
    x, weight = integers(3, channels, height, width, seed=0), integers(results, channels, 3, 3, seed=1)
    bias, add = integers(results, seed=2), integers(3, results, seed=3)
    exact = F.conv2d(F.pad(x, sides), weight, bias) + add[:, :, None, None]
    rest = integers(*exact.shape, seed=4)
    x, rest = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, rest))
    weight, bias, add = (t.to(dtype) for t in (weight, bias, add))
    for one in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        got = taps.convolve(x, one, bias, sides, add, rest, False)
        assert torch.equal(got, (exact + rest.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_neighbours_change_no_bit(dtype):
    """A thread begins anywhere in a picture."""
    x, weight = make((5, 80, 23, 18), "cpu", dtype, "channels_last"), make((3, 80, 3, 3), "cpu", dtype, seed=1)
    assert_own_bits(lambda x: taps.convolve(x, weight, None, ONE, None, None, True), x)


@pytest.mark.parametrize("channels", [64, 1280])
def test_error_is_at_most_twice_that_of_pytorch(channels):
    x = make((1, channels, 8, 8), "cpu", torch.float32, "channels_last")
    weight = make((3, channels, 3, 3), "cpu", torch.float32, seed=1) / (9 * channels) ** 0.5
    got = taps.convolve(x, weight, None, ONE, None, None, False)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    own, error = F.conv2d(x, weight, padding=1).double() - exact, got.double() - exact
    assert error.square().mean().sqrt() <= 2 * own.square().mean().sqrt()
    assert error.abs().max() <= 2 * own.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_pixels_that_see_it(value):
    weight = make((3, 40, 3, 3), "cpu", torch.float32, seed=1)
    for place in ((0, 0), (3, 4), (6, 5)):
        x = make((1, 40, 7, 6), "cpu", torch.float32, "channels_last")
        x[0, 7, place[0], place[1]] = value
        got, plain = taps.convolve(x, weight, None, ONE, None, None, False), F.conv2d(x, weight, padding=1)
        assert torch.equal(got.isfinite(), plain.isfinite())


@pytest.mark.parametrize(
    ("dtype", "native", "amx", "expected"),
    [
        (torch.float32, True, True, True),
        (torch.bfloat16, True, False, True),
        (torch.bfloat16, True, True, False),  # has not been timed
        (torch.float16, False, True, True),
    ],
)
def test_it_is_taken_for_few_results(monkeypatch, dtype, native, amx, expected):
    monkeypatch.setattr(taps, "compute_dtype", lambda dtype, convolution: dtype if native else torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    weight = torch.empty(4, 320, 3, 3, device="meta", dtype=dtype)
    assert taps.pay(weight, 1, False, dtype) == expected
    assert not taps.pay(weight, 2, False, dtype)
    assert not taps.pay(weight, 1, True, dtype)
    assert not taps.pay(torch.empty(4, 320, 1, 1, device="meta"), 1, False, dtype)
    assert not taps.pay(torch.empty(5, 320, 3, 3, device="meta"), 1, False, dtype)


def test_the_op_takes_it_and_batch_invariant_leaves_its_batches_whole(calls):
    x, weight = make((3, 64, 8, 8), "cpu", torch.float32), make((3, 64, 3, 3), "cpu", torch.float32, seed=1)
    plain = diffkern.conv2d(x, weight)
    with diffkern.batch_invariant():
        together, alone = diffkern.conv2d(x, weight), diffkern.conv2d(x[1:2], weight)
    assert calls == [3, 3, 1]
    assert torch.equal(together, plain)
    assert torch.equal(together[1:2], alone)


def test_the_kernel_refuses_what_does_not_fit():
    kernel, x = torch.ops.diffkern_C.taps, make((2, 32, 6, 6), "cpu", torch.float32, "channels_last")
    weight = make((3, 32, 3, 3), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="must be channels_last"):
        kernel(x.contiguous(), weight, ONE, None, None, False, None)
    for wrong in (weight[:, 1:], weight[:, :, 1:], torch.cat([weight, weight])):
        with pytest.raises(RuntimeError, match=r"weight must be \[1 to 4, 32, 3, 3\], got"):
            kernel(x, wrong, ONE, None, None, False, None)
    with pytest.raises(RuntimeError, match="weight must have the dtype of x"):
        kernel(x, weight.half(), ONE, None, None, False, None)
    with pytest.raises(RuntimeError, match=r"bias must be a dense \[3\] of the dtype of x, got \[4\]"):
        kernel(x, weight, ONE, torch.zeros(4), None, False, None)
    with pytest.raises(RuntimeError, match=r"add must be a dense \[2, 3\]"):
        kernel(x, weight, ONE, None, torch.zeros(3, 2).T, False, None)
    with pytest.raises(RuntimeError, match=r"residual must be a dense \[2, 3, 6, 6\]"):
        kernel(x, weight, ONE, None, None, False, torch.zeros(2, 3, 6, 6))
    with pytest.raises(RuntimeError, match="padding must be four numbers"):
        kernel(x, weight, (1, 1), None, None, False, None)
    with pytest.raises(RuntimeError, match="nothing to convolve"):
        kernel(x[:1, :, :1], weight, (1, 1, 0, 0), None, None, False, None)

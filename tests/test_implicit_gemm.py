"""Convolutions as one product of pixels: exact where arithmetic is, the same in any batch, taken where it pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from one_sample import assert_own_bits

import diffkern
from diffkern import implicit_gemm, packing
from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.testing import make

pytestmark = [
    pytest.mark.skipif(availability("cpu") is not None, reason="a kernel of the cpu backend"),
    pytest.mark.skipif(packing.vectors() is None, reason="not chosen on this kind of CPU"),
]
ONE, NONE, END = (1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 0, 1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def cpu():
    with torch.no_grad(), use_backend("cpu"):
        yield


def exact(x, weight, bias, stride, sides, add, residual):
    y = F.conv2d(F.pad(x.double(), sides), weight.double(), bias.double(), stride)
    return y + add.double()[:, :, None, None] + residual.double()


# Channels that fill no word and no vector, that are gathered or read where they are, of two chains and of more; results
# of half a panel and of many; taps outside on all sides, on one, and many of them.
CASES = [
    (3, 5, (7, 6), (3, 3), 1, ONE),
    (16, 32, (5, 4), (3, 3), 1, ONE),
    (17, 33, (6, 7), (3, 3), 2, END),
    (32, 48, (9, 8), (3, 3), 2, ONE),
    (34, 65, (4, 4), (3, 3), 1, ONE),
    (330, 161, (3, 5), (3, 3), 1, ONE),
    (64, 64, (5, 9), (1, 1), 1, NONE),
    (62, 17, (6, 5), (1, 1), 2, NONE),
    (5, 70, (9, 2), (1, 1), 1, NONE),
    (600, 40, (3, 4), (1, 1), 1, NONE),
    (20, 24, (8, 11), (5, 3), 3, (2, 0, 1, 4)),
    (18, 20, (2, 1), (3, 2), 1, (1, 1, 2, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "results", "size", "kernel", "stride", "sides"), CASES)
def test_integers_come_out_exactly(channels, results, size, kernel, stride, sides, dtype):
    """Numbers of -1, 0 and 1 have sums that float32 holds; 16 bits round them once."""

    def integers(*shape: int, seed: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    x = integers(5, channels, *size, seed=0).contiguous(memory_format=torch.channels_last)
    weight, bias = integers(results, channels, *kernel, seed=1), integers(results, seed=2)
    add = integers(5, results, seed=3)
    rows, columns = (
        (s + before + after - k) // stride + 1
        for s, k, before, after in zip(size, kernel, sides[2::-2], sides[3::-2], strict=True)
    )
    residual = integers(5, results, rows, columns, seed=4).contiguous(memory_format=torch.channels_last)
    got = implicit_gemm.convolve(x, weight, bias, stride, sides, add, residual, False)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, exact(x, weight, bias, stride, sides, add, residual).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "sides"), [(80, 3, 1, ONE), (80, 3, 2, END), (96, 1, 1, NONE), (3, 3, 1, ONE)]
)
def test_threads_and_neighbours_change_no_bit(dtype, channels, kernel, stride, sides):
    """Blocks of pixels reach over samples, and are of another size for another number of threads."""
    x = make((5, channels, 13, 10), "cpu", dtype, "channels_last")
    weight = make((72, channels, kernel, kernel), "cpu", dtype, seed=1)
    assert_own_bits(lambda x: implicit_gemm.convolve(x, weight, None, stride, sides, None, None, True), x)


@pytest.mark.parametrize("channels", [64, 1280])
def test_error_is_at_most_that_of_pytorch(channels):
    """A chain has at most 256 words."""
    x = make((1, channels, 8, 8), "cpu", torch.float32, "channels_last")
    weight = make((32, channels, 3, 3), "cpu", torch.float32, seed=1) / (9 * channels) ** 0.5
    got = implicit_gemm.convolve(x, weight, None, 1, ONE, None, None, False)
    true = F.conv2d(x.double(), weight.double(), padding=1)
    own, error = F.conv2d(x, weight, padding=1).double() - true, got.double() - true
    assert error.square().mean().sqrt() <= own.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [3, 40, 41])
def test_what_is_not_finite_reaches_the_pixels_that_see_it(channels, value, dtype):
    weight = make((33, channels, 3, 3), "cpu", dtype, seed=1)
    for place in ((0, 0), (3, 4), (6, 5)):
        x = make((1, channels, 7, 6), "cpu", dtype, "channels_last")
        x[0, 2, place[0], place[1]] = value
        got = implicit_gemm.convolve(x, weight, None, 1, ONE, None, None, False)
        assert torch.equal(got.isfinite(), F.conv2d(x.float(), weight.float(), padding=1).isfinite())


@pytest.mark.parametrize("offset", [1, 2])
def test_pictures_may_begin_within_a_word(offset):
    memory = make((2 * 6 * 6 * 64 + offset,), "cpu", torch.bfloat16)
    x = memory[offset:].view(2, 6, 6, 64).permute(0, 3, 1, 2)
    weight = make((32, 64, 1, 1), "cpu", torch.bfloat16, seed=1)
    got = implicit_gemm.convolve(x, weight, None, 1, NONE, None, None, False)
    again = x.clone(memory_format=torch.channels_last)
    assert torch.equal(got, implicit_gemm.convolve(again, weight, None, 1, NONE, None, None, False))


def test_a_weight_that_changed_is_packed_again():
    x, weight = make((2, 64, 4, 4), "cpu", torch.bfloat16), make((64, 64, 1, 1), "cpu", torch.bfloat16, seed=1)
    before = diffkern.conv2d(x, weight, stride=2)
    weight *= 2
    assert torch.equal(diffkern.conv2d(x, weight, stride=2), 2 * before)


@pytest.mark.parametrize(
    ("dtype", "native", "amx", "expected"),
    [
        (torch.float32, True, True, True),
        (torch.bfloat16, True, False, True),
        (torch.bfloat16, True, True, False),  # has not been timed
        (torch.float16, False, True, True),
    ],
)
def test_it_is_taken_where_it_pays_and_for_all_under_batch_invariant(monkeypatch, dtype, native, amx, expected):
    monkeypatch.setattr(implicit_gemm, "compute_dtype", lambda dtype, convolution: dtype if native else torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(implicit_gemm, "vectors", lambda: "AVX512")

    def pays(channels: int, kernel: int, pixels: int, side: int = 0, upsample: bool = False) -> bool:
        weight = torch.empty(256, channels, kernel, kernel, device="meta", dtype=dtype)
        return implicit_gemm.pays(weight, [side] * 4, upsample, (pixels, pixels), dtype)

    assert pays(16, 3, 16) == pays(1024, 3, 8) == expected
    few = [(96, 1, 16), (512, 1, 16), (1280, 1, 8)]
    assert all(pays(*call) == (expected and dtype != torch.float32) for call in few)
    left = [(15, 3, 16), (16, 3, 17), (1025, 3, 8), (96, 1, 17), (95, 1, 16), (513, 1, 16)]
    assert all(pays(*call) == (not native) for call in left)
    with diffkern.batch_invariant():
        assert all(pays(*call) == expected for call in few + left)
        assert not pays(96, 1, 16, side=1)  # pixels that see nothing
        assert not pays(96, 3, 16, upsample=True)


def test_with_avx2_alone_it_is_taken_from_a_vector_of_channels_on(monkeypatch):
    """There oneDNN may lay the weight out anew in every call, which can take longer than its products."""
    monkeypatch.setattr(implicit_gemm, "compute_dtype", lambda dtype, convolution: dtype)

    def pays(channels: int, kernel: int, pixels: int) -> bool:
        weight = torch.empty(256, channels, kernel, kernel, device="meta")
        return implicit_gemm.pays(weight, [0] * 4, False, (pixels, pixels), torch.float32)

    calls = [(16, 3, 17), (1025, 3, 8), (96, 1, 64), (512, 1, 4), (16, 1, 1)]
    for found, expected in (("AVX2", True), (None, False)):
        monkeypatch.setattr(implicit_gemm, "vectors", lambda found=found: found)
        assert all(pays(*call) == expected for call in calls)
        assert not pays(15, 3, 16)


def test_batch_invariant_leaves_its_batches_whole(monkeypatch):
    """It is anyway; one sample at a time would only cost time."""
    made, convolve = [], implicit_gemm.convolve

    def counted(x, *rest):
        made.append(len(x))
        return convolve(x, *rest)

    monkeypatch.setattr(implicit_gemm, "convolve", counted)
    x, weight = make((3, 4, 8, 8), "cpu", torch.float32), make((64, 4, 3, 3), "cpu", torch.float32, seed=1)
    diffkern.conv2d(x, weight)
    with diffkern.batch_invariant():
        together, alone = diffkern.conv2d(x, weight), diffkern.conv2d(x[1:2], weight)
    assert made == [3, 1]
    assert torch.equal(together[1:2], alone)


def test_the_kernel_refuses_what_does_not_fit():
    kernel, x = torch.ops.diffkern_C.convolution, make((2, 32, 6, 6), "cpu", torch.float32, "channels_last")
    weight = torch.ops.diffkern_C.panels(make((8, 3, 3 * 32), "cpu", torch.float32), False)

    def run(x=x, weight=weight, kernel_size=(3, 3), stride=1, sides=ONE, bias=None, add=None, residual=None):
        kernel(x, weight, 8, kernel_size, stride, sides, bias, add, False, residual)

    run()
    for wrong, sentence in (
        ({"x": x.contiguous()}, "must be channels_last"),
        ({"weight": weight[1:]}, "weight was packed for another shape"),
        ({"kernel_size": (3,)}, "kernel must be two numbers"),
        ({"stride": 0}, "stride and results 1 and above"),
        ({"sides": (1, 1)}, "padding must be four numbers"),
        ({"sides": (0, 3, 0, 0)}, "less than the kernel"),
        ({"x": x[:1, :, :1], "sides": (1, 1, 0, 0)}, "nothing to convolve"),
        ({"bias": torch.zeros(7)}, r"bias must be contiguous \[8\], got \[7\]"),
        ({"add": torch.zeros(8, 2).T}, r"add must be contiguous \[2, 8\]"),
        ({"residual": torch.zeros(2, 8, 6, 6)}, "residual must have the shape, layout and dtype"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run(**wrong)

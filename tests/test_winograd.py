"""Winograd's convolutions: exact where arithmetic is, as near as oneDNN where it is not, and taken where they pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from one_sample import assert_own_bits

import diffkern
from diffkern import packing, winograd
from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.testing import make

pytestmark = [
    pytest.mark.skipif(availability("cpu") is not None, reason="a kernel of the cpu backend"),
    pytest.mark.skipif(not winograd._measured(), reason="not chosen on this kind of CPU"),
]
ONE = (1, 1, 1, 1)
forms = pytest.mark.parametrize(("pixels", "upsample"), [(m, doubled) for m in (2, 4, 6) for doubled in (False, True)])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_samples_named_for_it_take_it(calls, dtype):
    samples = [s for s in diffkern.conv2d.make_samples("cpu", dtype) if "Winograd" in s.name]
    if dtype != torch.float32:
        samples = [s for s in samples if "4 x 4" in s.name or "6 x 6" in s.name]
        if torch.cpu._is_amx_tile_supported():
            pytest.skip("AMX is faster in 16 bits")
    for sample in samples:
        diffkern.conv2d(*sample.args())
    assert len(calls) == len(samples) >= (4 if dtype != torch.float32 else 8)
    expected = [2 if dtype == torch.float32 else 6 if "6 x 6" in s.name else 4 for s in samples]
    assert [args[-1] for args in calls] == expected
    diffkern.conv2d(make((2, 64, 8, 8), "cpu", dtype), make((64, 64, 3, 3), "cpu", dtype), None, 2)
    diffkern.conv2d(make((2, 64, 8, 8), "cpu", dtype), make((64, 64, 1, 1), "cpu", dtype))
    assert len(calls) == len(samples)


@pytest.mark.parametrize(
    ("dtype", "native", "amx", "few", "many"),
    [
        (torch.float32, True, False, 2, 2),
        (torch.bfloat16, False, False, 4, 2),
        (torch.bfloat16, True, False, 4, 0),  # AVX512_BF16
        (torch.bfloat16, True, True, 0, 0),
        (torch.float16, False, True, 4, 2),
    ],
)
def test_the_tile_depends_on_what_the_cpu_multiplies(monkeypatch, dtype, native, amx, few, many):
    """few: at 8 x 8 pixels, of weights that stay in a cache; and at 16 x 16 of any. many: at 8 x 8, of those that do
    not; and at 4 x 4 of any."""
    monkeypatch.setattr(winograd, "compute_dtype", lambda dtype, convolution: dtype if native else torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for channels, small in ((256, few), (1280, many)):
        weight = torch.empty(channels, channels, 3, 3, device="meta", dtype=dtype)
        for size, expected in (((16, 16), few), ((8, 32), few), ((15, 17), small), ((8, 8), small), ((7, 64), many)):
            assert winograd.tile(weight, 1, ONE, False, size, dtype) == expected
        assert winograd.tile(weight, 1, ONE, False, (4, 4), dtype) == many
        assert winograd.tile(weight, 2, ONE, False, (16, 16), dtype) == 0
        assert winograd.tile(weight, 1, (0, 1, 0, 1), True, (16, 16), dtype) == 0


def test_the_largest_tile_must_have_clearly_fewer_points(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    weight = torch.empty(256, 256, 3, 3, device="meta", dtype=torch.bfloat16)
    for upsample in (False, True):
        # A few tiles; no fewer points at 16, 20 and 32 pixels, which 6 do not divide; few fewer at 28.
        for size in ((12, 12), (16, 16), (20, 20), (32, 32), (8, 64)):
            assert winograd.tile(weight, 1, ONE, upsample, size, weight.dtype) == 4
        for size in ((18, 18), (24, 24), (64, 64), (12, 64), (512, 512)):
            assert winograd.tile(weight, 1, ONE, upsample, size, weight.dtype) == 6
        assert winograd.tile(weight, 1, ONE, upsample, (28, 28), weight.dtype) == (4 if upsample else 6)


@pytest.mark.parametrize(
    ("channels", "results", "size", "single", "half"),
    [
        (15, 64, (8, 8), 0, 0),  # less than a vector
        (16, 16, (16, 16), 2, 4),
        (16, 16, (16, 17), 2, 0),  # few products, many pixels
        (24, 24, (64, 64), 2, 6),
        (320, 4, (32, 32), 2, 0),  # few results of many channels
        (128, 3, (32, 32), 2, 4),
        (64, 64, (2, 3), 2, 4),  # within a tile
        (256, 256, (3, 3), 2, 0),
        (257, 256, (3, 3), 0, 0),
    ],
)
def test_few_channels_and_few_pixels_have_their_own_limits(monkeypatch, channels, results, size, single, half):
    """half: of bfloat16 with AVX512_BF16."""
    monkeypatch.setattr(winograd, "compute_dtype", lambda dtype, convolution: dtype)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for dtype, expected in ((torch.float32, single), (torch.bfloat16, half)):
        weight = torch.empty(results, channels, 3, 3, device="meta", dtype=dtype)
        assert winograd.tile(weight, 1, ONE, False, size, dtype) == expected


def integers(*shape: int, most: int, seed: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@forms
@pytest.mark.parametrize(
    ("channels", "results", "height", "width"),
    [(64, 64, 8, 8), (100, 131, 5, 11), (35, 5, 7, 4), (33, 33, 6, 5), (17, 49, 4, 9), (65, 145, 5, 5), (49, 17, 4, 4)],
)
def test_integers_come_out_exactly(channels, results, height, width, pixels, upsample):
    """Of multiples of 4 all halves and quarters on the way are integers, of 576 all twenty-fourths too, and all sums
    are below 2^24. In tiles of 6 x 6 they would not be: there the error is far below a half, so that the result is
    known."""
    x = integers(5, channels, height, width, most=4 if pixels == 2 else 1, seed=0)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = integers(results, channels, 3, 3, most=1, seed=1) * {2: 4, 4: 576, 6: 1}[pixels]
    bias, add = integers(results, most=9, seed=2), integers(5, results, most=9, seed=3)
    got = winograd.convolve(x, weight, bias, ONE, add, None, False, upsample, pixels)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    exact = F.conv2d(big.double(), weight.double(), bias.double(), padding=1) + add.double()[:, :, None, None]
    if pixels == 6:
        assert (got - exact).abs().max() < 0.01
    else:
        assert torch.equal(got.double(), exact)


@forms
def test_each_number_of_a_kernel_moves_the_picture_by_its_place(pixels, upsample):
    """Result 9 c + k is channel 64 + c as seen by the k-th number alone: all points of one kernel matter, kept or made,
    and of weights that begin in the second block of channels."""
    x = integers(2, 68, 6, 9, most=8, seed=0).contiguous(memory_format=torch.channels_last)
    weight, one = torch.zeros(36, 68, 3, 3), 8100 if pixels == 6 else 576  # of which the points are integers
    for i in range(36):
        weight[i, 64 + i // 9, i % 9 // 3, i % 3] = one
    got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample, pixels)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    height, width = big.shape[2:]
    wide = F.pad(big[:, 64:] * one, (1, 1, 1, 1))
    for i in range(36):
        top, left = i % 9 // 3, i % 3
        assert torch.equal(got[:, i], wide[:, i // 9, top : top + height, left : left + width])


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_keeps_nine_numbers_of_each_kernel(dtype, pixels, upsample):
    """In larger tiles its own, in its own dtype; in 2 x 2 nine points, of which those at the corners are its own."""
    weight = make((64, 48, 3, 3), "cpu", dtype)
    kept = torch.ops.diffkern_C.winograd_weight(weight, upsample, pixels)
    assert (kept.numel(), kept.dtype) == (weight.numel(), torch.float32 if pixels == 2 else dtype)
    if pixels > 2:
        assert torch.equal(kept.sort().values, weight.flatten().sort().values)
    else:
        corners = weight[..., ::2, ::2].flatten().float()
        assert torch.isin(corners, kept).all()


@forms
@pytest.mark.parametrize("channels", [64, 320, 1280])
def test_error_is_near_that_of_the_definition(channels, pixels, upsample):
    """Of 2 x 2 tiles at most twice that of the direct sum. Of larger tiles, whose transforms multiply by up to 32, at
    most 16 times in the mean and 64 times in the worst pixel: a hundredth of a bfloat16's last place."""
    x = make((1, channels, 8, 8), "cpu", torch.float32, "channels_last")
    weight = make((64, channels, 3, 3), "cpu", torch.float32, seed=1) / (9 * channels) ** 0.5
    got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample, pixels)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    exact = F.conv2d(big.double(), weight.double(), padding=1)
    own, error = F.conv2d(big, weight, padding=1).double() - exact, got.double() - exact
    mean, worst = (2, 2) if pixels == 2 else (16, 64)
    assert error.square().mean().sqrt() <= mean * own.square().mean().sqrt()
    assert error.abs().max() <= worst * own.abs().max()


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_neighbours_change_no_bit(dtype, pixels, upsample):
    """Blocks of tiles reach over samples, and are of another size for another number of threads."""
    x = make((5, 80, 23, 18), "cpu", dtype, "channels_last")
    weight = make((72, 80, 3, 3), "cpu", dtype, seed=1)
    assert_own_bits(lambda x: winograd.convolve(x, weight, None, ONE, None, None, False, upsample, pixels), x)


@forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_as_float32_and_rounded_once(dtype, pixels, upsample):
    """Whatever the layout of the weight, whose points are made in other places for larger tiles than of 2 x 2."""
    x = make((2, 100, 5, 11), "cpu", dtype, "channels_last")
    weight = make((131, 100, 3, 3), "cpu", dtype, seed=1) / 32
    args = (None, ONE, None, None, False, upsample, pixels)
    expected = winograd.convolve(x.float(), weight.float(), *args).to(dtype)
    for one in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        assert torch.equal(winograd.convolve(x, one, *args), expected)


def test_batch_invariant_leaves_its_batches_whole(calls):
    """It is anyway; one sample at a time would only cost time."""
    x, weight = make((3, 64, 8, 8), "cpu", torch.float32), make((64, 64, 3, 3), "cpu", torch.float32, seed=1)
    with diffkern.batch_invariant():
        together, alone = diffkern.conv2d(x, weight), diffkern.conv2d(x[1:2], weight)
    assert [len(args[0]) for args in calls] == [3, 1]
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@forms
def test_what_is_not_finite_stays_where_it_belongs(value, pixels, upsample):
    """In tiles of 2 x 2 not a pixel more than those that see it, though a tile's patch is larger; in larger tiles not a
    tile more. Infinity may turn into NaN."""
    weight = make((33, 40, 3, 3), "cpu", torch.float32, seed=1)
    for place in ((0, 0), (3, 4), (4, 3), (6, 5)):
        x = make((1, 40, 7, 6), "cpu", torch.float32, "channels_last")
        x[0, 7, place[0], place[1]] = value
        got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample, pixels)
        big = F.interpolate(x, scale_factor=2.0) if upsample else x
        reached, sees = ~got.isfinite(), ~F.conv2d(big, weight, padding=1).isfinite()
        tiles = F.max_pool2d(sees.float(), pixels, ceil_mode=True).bool()
        tiles = tiles.repeat_interleave(pixels, 2).repeat_interleave(pixels, 3)
        allowed = sees if pixels == 2 else tiles[:, :, : sees.shape[2], : sees.shape[3]]
        assert reached[sees].all()
        assert not reached[~allowed].any()


def test_one_copy_serves_all_sizes_of_pictures():
    before, weight = packing.kept_bytes(), make((64, 64, 3, 3), "cpu", torch.float32)
    for size in (8, 9, 16):
        diffkern.conv2d(make((1, 64, size, size), "cpu", torch.float32), weight)
    assert packing.kept_bytes() == before + 9 * 64 * 64 * 4
    diffkern.conv2d(make((1, 64, 8, 8), "cpu", torch.float32), weight, upsample=True)
    assert packing.kept_bytes() == before + 2 * 9 * 64 * 64 * 4
    for pixels in (4, 6):
        x = make((1, 64, 8, 8), "cpu", torch.float32, "channels_last")
        winograd.convolve(x, weight, None, ONE, None, None, False, False, pixels)
    assert packing.kept_bytes() == before + 3 * 9 * 64 * 64 * 4


@pytest.mark.parametrize("pixels", [4, 6])
def test_a_far_pixel_costs_its_neighbours_in_a_tile_a_few_millionths_of_it(pixels):
    x = make((1, 64, 8, 8), "cpu", torch.float32, "channels_last")
    x[0, :, 4, 4] *= 1e4
    weight = make((32, 64, 3, 3), "cpu", torch.float32, seed=1) / 24
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    unseen = torch.ones(8, 8, dtype=torch.bool)
    unseen[3:6, 3:6] = False
    got = winograd.convolve(x, weight, None, ONE, None, None, False, False, pixels)
    error = (got - exact).abs()[0, :, unseen].max()
    assert 1e-4 < error < 10 * 1e4 * 1e-6  # 1e-6 without the far pixel


def test_the_kernel_refuses_what_does_not_fit():
    kernel, x = torch.ops.diffkern_C.winograd, make((2, 32, 6, 6), "cpu", torch.float32, "channels_last")
    weight = torch.ops.diffkern_C.winograd_weight(make((32, 32, 3, 3), "cpu", torch.float32), False, 2)
    with pytest.raises(RuntimeError, match="packed for another shape"):
        kernel(x, weight, 64, ONE, None, None, False, None, False, 2)
    with pytest.raises(RuntimeError, match="doubled picture must be 1"):
        kernel(x, weight, 32, (0, 1, 1, 1), None, None, False, None, True, 2)
    with pytest.raises(RuntimeError, match="must be channels_last"):
        kernel(x.contiguous(), weight, 32, ONE, None, None, False, None, False, 2)
    with pytest.raises(RuntimeError, match="residual must have"):
        kernel(x, weight, 32, ONE, None, None, False, x[:, :, 1:], False, 2)
    with pytest.raises(RuntimeError, match=r"bias must be contiguous \[32\]"):
        kernel(x, weight, 32, ONE, torch.zeros(31), None, False, None, False, 2)
    with pytest.raises(RuntimeError, match="pixels must be 2, 4 or 6, got 3"):
        kernel(x, weight, 32, ONE, None, None, False, None, False, 3)
    with pytest.raises(RuntimeError, match="pixels must be 2, 4 or 6, got 0"):
        torch.ops.diffkern_C.winograd_weight(torch.zeros(32, 32, 3, 3), False, 0)

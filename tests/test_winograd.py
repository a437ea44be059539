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
from diffkern.winograd import Tile

pytestmark = [
    pytest.mark.skipif(availability("cpu") is not None, reason="a kernel of the cpu backend"),
    pytest.mark.skipif(packing.vectors() is None, reason="not chosen on this kind of CPU"),
]
ONE = (1, 1, 1, 1)
FLOATS, INTEGERS = [Tile(2), Tile(4), Tile(6)], Tile(4, integers=True)


def forms(*tiles: Tile):
    """Each tile, of a picture as it is and doubled."""
    return pytest.mark.parametrize(("tile", "upsample"), [(t, doubled) for t in tiles for doubled in (False, True)])


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
    native = winograd.compute_dtype(dtype, convolution=True) == dtype

    def expected(name: str) -> Tile:
        if dtype == torch.float32:
            return Tile(2)
        return INTEGERS if native and dtype == torch.bfloat16 else Tile(6 if "6 x 6" in name else 4)

    assert [args[-1] for args in calls] == [expected(s.name) for s in samples]
    diffkern.conv2d(make((2, 64, 8, 8), "cpu", dtype), make((64, 64, 3, 3), "cpu", dtype), None, 2)
    diffkern.conv2d(make((2, 64, 8, 8), "cpu", dtype), make((64, 64, 1, 1), "cpu", dtype))
    assert len(calls) == len(samples)


@pytest.fixture
def cpu_with(monkeypatch):
    """Have the rule see a CPU with or without instructions for 16-bit floats, AMX, and those for integers."""

    def set_to(native: bool, amx: bool = False, vnni: bool = True) -> None:
        monkeypatch.setattr(winograd, "compute_dtype", lambda dtype, convolution: dtype if native else torch.float32)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)

    return set_to


def chosen(channels: int, results: int, size: tuple[int, int], dtype: torch.dtype, upsample: bool = False, stride=1):
    weight = torch.empty(results, channels, 3, 3, device="meta", dtype=dtype)
    return winograd.tile(weight, stride, ONE, upsample, size, dtype)


def test_the_tile_depends_on_what_the_cpu_multiplies(cpu_with):
    """In float32 few tiles and many weights do not pay: at 8 x 8 pixels the weights must stay in a cache."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    for native, amx, vnni, dtype, few, many in (
        (True, False, True, single, Tile(2), Tile(2)),
        (False, False, True, brain, Tile(4), Tile(2)),
        (True, False, False, brain, Tile(4), None),
        (True, True, True, brain, None, None),
        (False, True, True, half, Tile(4), Tile(2)),
        (True, False, True, half, Tile(4), None),
    ):
        cpu_with(native, amx, vnni)
        for channels, small in ((256, few), (1280, many)):
            for size, expected in (
                ((16, 16), few),
                ((8, 32), few),
                ((15, 17), small),
                ((8, 8), small),
                ((7, 64), many),
            ):
                assert chosen(channels, channels, size, dtype) == expected
            assert chosen(channels, channels, (4, 4), dtype) == many
            assert chosen(channels, channels, (16, 16), dtype, stride=2) is None


def test_integers_are_taken_in_bfloat16_where_weights_are_used_by_enough_tiles(cpu_with):
    cpu_with(native=True)
    for size in ((8, 8), (4, 16), (16, 16), (64, 64), (512, 512)):
        for channels in (64, 256, 1280):
            assert chosen(channels, channels, size, torch.bfloat16) == INTEGERS
            assert chosen(channels, channels, size, torch.bfloat16, upsample=True) == INTEGERS
    for size, weights in (((4, 4), 1 << 17), ((7, 9), 1 << 17), ((3, 60), 1 << 12), ((2, 2), 1 << 12)):
        assert chosen(weights >> 6, 64, size, torch.bfloat16) == INTEGERS
        assert chosen((weights >> 6) + 1, 64, size, torch.bfloat16) is None
    weight = torch.empty(64, 64, 3, 3, device="meta", dtype=torch.bfloat16)
    assert winograd.tile(weight, 1, (0, 1, 0, 1), True, (16, 16), torch.bfloat16) is None
    assert winograd.tile(weight, 1, (0, 1, 0, 1), False, (16, 16), torch.bfloat16) == INTEGERS


def test_the_largest_tile_must_have_clearly_fewer_points(cpu_with):
    cpu_with(native=False)
    for upsample in (False, True):
        # A few tiles; no fewer points at 16, 20 and 32 pixels, which 6 do not divide; few fewer at 28.
        for size in ((12, 12), (16, 16), (20, 20), (32, 32), (8, 64)):
            assert chosen(256, 256, size, torch.bfloat16, upsample) == Tile(4)
        for size in ((18, 18), (24, 24), (64, 64), (12, 64), (512, 512)):
            assert chosen(256, 256, size, torch.bfloat16, upsample) == Tile(6)
        assert chosen(256, 256, (28, 28), torch.bfloat16, upsample) == Tile(4 if upsample else 6)


@pytest.mark.parametrize(
    ("channels", "results", "size", "single", "half"),
    [
        (15, 64, (8, 8), None, None),  # less than a vector
        (16, 16, (16, 16), Tile(2), INTEGERS),
        (16, 16, (16, 17), Tile(2), None),  # few products, many pixels
        (24, 24, (64, 64), Tile(2), INTEGERS),
        (320, 4, (32, 32), Tile(2), None),  # few results of many channels
        (128, 3, (32, 32), Tile(2), INTEGERS),
        (64, 64, (2, 3), Tile(2), INTEGERS),  # within a tile
        (256, 256, (3, 3), Tile(2), None),
        (257, 256, (3, 3), None, None),
    ],
)
def test_few_channels_and_few_pixels_have_their_own_limits(cpu_with, channels, results, size, single, half):
    """half: of bfloat16 with AVX512_BF16."""
    cpu_with(native=True)
    assert chosen(channels, results, size, torch.float32) == single
    assert chosen(channels, results, size, torch.bfloat16) == half


def integers(*shape: int, most: int, seed: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@forms(*FLOATS)
@pytest.mark.parametrize(
    ("channels", "results", "height", "width"),
    [(64, 64, 8, 8), (100, 131, 5, 11), (35, 5, 7, 4), (33, 33, 6, 5), (17, 49, 4, 9), (65, 145, 5, 5), (49, 17, 4, 4)],
)
def test_integers_come_out_exactly(channels, results, height, width, tile, upsample):
    """Of multiples of 4 all halves and quarters on the way are integers, of 576 all twenty-fourths too, and all sums
    are below 2^24. In tiles of 6 x 6 they would not be: there the error is far below a half, so that the result is
    known."""
    x = integers(5, channels, height, width, most=4 if tile.pixels == 2 else 1, seed=0)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = integers(results, channels, 3, 3, most=1, seed=1) * {2: 4, 4: 576, 6: 1}[tile.pixels]
    bias, add = integers(results, most=9, seed=2), integers(5, results, most=9, seed=3)
    got = winograd.convolve(x, weight, bias, ONE, add, None, False, upsample, tile)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    exact = F.conv2d(big.double(), weight.double(), bias.double(), padding=1) + add.double()[:, :, None, None]
    if tile.pixels == 6:
        assert (got - exact).abs().max() < 0.01
    else:
        assert torch.equal(got.double(), exact)


@forms(*FLOATS)
def test_each_number_of_a_kernel_moves_the_picture_by_its_place(tile, upsample):
    """Result 9 c + k is channel 64 + c as seen by the k-th number alone: all points of one kernel matter, kept or made,
    and of weights that begin in the second block of channels."""
    x = integers(2, 68, 6, 9, most=8, seed=0).contiguous(memory_format=torch.channels_last)
    weight, one = torch.zeros(36, 68, 3, 3), 8100 if tile.pixels == 6 else 576  # of which the points are integers
    for i in range(36):
        weight[i, 64 + i // 9, i % 9 // 3, i % 3] = one
    got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample, tile)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    height, width = big.shape[2:]
    wide = F.pad(big[:, 64:] * one, (1, 1, 1, 1))
    for i in range(36):
        top, left = i % 9 // 3, i % 3
        assert torch.equal(got[:, i], wide[:, i // 9, top : top + height, left : left + width])


@forms(*FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_keeps_nine_numbers_of_each_kernel(dtype, tile, upsample):
    """In larger tiles its own, in its own dtype; in 2 x 2 nine points, of which those at the corners are its own."""
    weight = make((64, 48, 3, 3), "cpu", dtype)
    kept = torch.ops.diffkern_C.winograd_weight(weight, upsample, tile.pixels)
    assert (kept.numel(), kept.dtype) == (weight.numel(), torch.float32 if tile.pixels == 2 else dtype)
    if tile.pixels > 2:
        assert torch.equal(kept.sort().values, weight.flatten().sort().values)
    else:
        corners = weight[..., ::2, ::2].flatten().float()
        assert torch.isin(corners, kept).all()


@forms(*FLOATS)
@pytest.mark.parametrize("channels", [64, 320, 1280])
def test_error_is_near_that_of_the_definition(channels, tile, upsample):
    """Of 2 x 2 tiles at most twice that of the direct sum. Of larger tiles, whose transforms multiply by up to 32, at
    most 16 times in the mean and 64 times in the worst pixel: a hundredth of a bfloat16's last place."""
    x = make((1, channels, 8, 8), "cpu", torch.float32, "channels_last")
    weight = make((64, channels, 3, 3), "cpu", torch.float32, seed=1) / (9 * channels) ** 0.5
    got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample, tile)
    big = F.interpolate(x, scale_factor=2.0) if upsample else x
    exact = F.conv2d(big.double(), weight.double(), padding=1)
    own, error = F.conv2d(big, weight, padding=1).double() - exact, got.double() - exact
    mean, worst = (2, 2) if tile.pixels == 2 else (16, 64)
    assert error.square().mean().sqrt() <= mean * own.square().mean().sqrt()
    assert error.abs().max() <= worst * own.abs().max()


@forms(*FLOATS, INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_neighbours_change_no_bit(dtype, tile, upsample):
    """Blocks of tiles reach over samples, and are of another size for another number of threads."""
    x = make((5, 80, 23, 18), "cpu", dtype, "channels_last")
    weight = make((72, 80, 3, 3), "cpu", dtype, seed=1)
    assert_own_bits(lambda x: winograd.convolve(x, weight, None, ONE, None, None, False, upsample, tile), x)


@forms(*FLOATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_as_float32_and_rounded_once(dtype, tile, upsample):
    """Whatever the layout of the weight, whose points are made in other places for larger tiles than of 2 x 2."""
    x = make((2, 100, 5, 11), "cpu", dtype, "channels_last")
    weight = make((131, 100, 3, 3), "cpu", dtype, seed=1) / 32
    args = (None, ONE, None, None, False, upsample, tile)
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
@forms(*FLOATS, INTEGERS)
def test_what_is_not_finite_stays_where_it_belongs(value, tile, upsample):
    """In tiles of 2 x 2 not a pixel more than those that see it, though a tile's patch is larger; in larger tiles not a
    tile more. Infinity may turn into NaN."""
    weight = make((33, 40, 3, 3), "cpu", torch.float32, seed=1)
    for place in ((0, 0), (3, 4), (4, 3), (6, 5)):
        x = make((1, 40, 7, 6), "cpu", torch.float32, "channels_last")
        x[0, 7, place[0], place[1]] = value
        got = winograd.convolve(x, weight, None, ONE, None, None, False, upsample, tile)
        big = F.interpolate(x, scale_factor=2.0) if upsample else x
        reached, sees = ~got.isfinite(), ~F.conv2d(big, weight, padding=1).isfinite()
        tiles = F.max_pool2d(sees.float(), tile.pixels, ceil_mode=True).bool()
        tiles = tiles.repeat_interleave(tile.pixels, 2).repeat_interleave(tile.pixels, 3)
        allowed = sees if tile.pixels == 2 else tiles[:, :, : sees.shape[2], : sees.shape[3]]
        assert reached[sees].all()
        assert not reached[~allowed].any()


def test_one_copy_serves_all_sizes_of_pictures():
    before, weight = packing.kept_bytes(), make((64, 64, 3, 3), "cpu", torch.float32)
    for size in (8, 9, 16):
        diffkern.conv2d(make((1, 64, size, size), "cpu", torch.float32), weight)
    assert packing.kept_bytes() == before + 9 * 64 * 64 * 4
    diffkern.conv2d(make((1, 64, 8, 8), "cpu", torch.float32), weight, upsample=True)
    assert packing.kept_bytes() == before + 2 * 9 * 64 * 64 * 4
    for tile in (Tile(4), Tile(6)):
        x = make((1, 64, 8, 8), "cpu", torch.float32, "channels_last")
        winograd.convolve(x, weight, None, ONE, None, None, False, False, tile)
    assert packing.kept_bytes() == before + 3 * 9 * 64 * 64 * 4
    winograd.convolve(x, weight, None, ONE, None, None, False, False, INTEGERS)
    assert packing.kept_bytes() == before + 3 * 9 * 64 * 64 * 4 + 36 * 64 * 4  # the units
    winograd.convolve(x, weight, None, ONE, None, None, False, True, INTEGERS)  # has its own of both
    assert packing.kept_bytes() == before + 4 * 9 * 64 * 64 * 4 + (36 + 25) * 64 * 4


@pytest.mark.parametrize(("tile", "share"), [(Tile(4), 1e-6), (Tile(6), 1e-6), (INTEGERS, 1e-4)])
def test_a_far_pixel_costs_its_neighbours_in_a_tile_digits_of_it(tile, share):
    x = make((1, 64, 8, 8), "cpu", torch.float32, "channels_last")
    x[0, :, 4, 4] *= 1e4
    weight = make((32, 64, 3, 3), "cpu", torch.float32, seed=1) / 24
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    unseen = torch.ones(8, 8, dtype=torch.bool)
    unseen[3:6, 3:6] = False
    got = winograd.convolve(x, weight, None, ONE, None, None, False, False, tile)
    error = (got - exact).abs()[0, :, unseen].max()
    assert 1e-2 * share < error / 1e4 < 10 * share


def test_the_kernel_refuses_what_does_not_fit():
    kernel, x = torch.ops.diffkern_C.winograd, make((2, 32, 6, 6), "cpu", torch.float32, "channels_last")
    weight = torch.ops.diffkern_C.winograd_weight(make((32, 32, 3, 3), "cpu", torch.float32), False, 2)
    with pytest.raises(RuntimeError, match="packed for another shape"):
        kernel(x, weight, 64, ONE, None, None, False, None, False, 2, None)
    with pytest.raises(RuntimeError, match="doubled picture must be 1"):
        kernel(x, weight, 32, (0, 1, 1, 1), None, None, False, None, True, 2, None)
    with pytest.raises(RuntimeError, match="must be channels_last"):
        kernel(x.contiguous(), weight, 32, ONE, None, None, False, None, False, 2, None)
    with pytest.raises(RuntimeError, match="residual must have"):
        kernel(x, weight, 32, ONE, None, None, False, x[:, :, 1:], False, 2, None)
    with pytest.raises(RuntimeError, match=r"bias must be contiguous \[32\]"):
        kernel(x, weight, 32, ONE, torch.zeros(31), None, False, None, False, 2, None)
    with pytest.raises(RuntimeError, match="pixels must be 2, 4 or 6, got 3"):
        kernel(x, weight, 32, ONE, None, None, False, None, False, 3, None)
    weight = torch.ops.diffkern_C.winograd_weight(make((32, 32, 3, 3), "cpu", torch.float32), False, 4)
    units = torch.ops.diffkern_C.winograd_units(weight, 32, 32, True)
    with pytest.raises(RuntimeError, match="units are of tiles of 4 x 4, and were measured for another shape"):
        kernel(x, weight, 32, ONE, None, None, False, None, False, 4, units)  # those of a doubled picture
    with pytest.raises(RuntimeError, match="packed for another shape"):
        torch.ops.diffkern_C.winograd_units(weight, 32, 64, True)
    with pytest.raises(RuntimeError, match="pixels must be 2, 4 or 6, got 0"):
        torch.ops.diffkern_C.winograd_weight(torch.zeros(32, 32, 3, 3), False, 0)

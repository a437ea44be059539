"""Convolution with what follows it: bias, time embedding, SiLU, residual; or with nearest-neighbour upsampling in
front. The library's, without a bias, and one pass behind it; or, where a table says that it is faster, one kernel.

In the kernel, a product of matrices that nobody builds, a row is a pixel of the result, and its sum runs over the
kernel's taps and the channels below each: a tap reads the pixels of a tile shifted, zeros outside the picture. Where
there are too few tiles for the chip, several programs share the sums of one, and a second pass adds theirs in a fixed
order.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .common import cdiv, on_device, power_of_2
from .conv2d_cuts import CUTS, Cut, gives_moments, size_of, tile_of, why_not
from .conv2d_moments import cut_with_moments
from .epilogue import epilogue, silu, vector
from .launch import remembered
from .linear import linear


@triton.jit
def _moments_of_runs(y, moments, place, column, n, RUN: tl.constexpr):
    """Writes those of tile `place`, which is whole runs of RUN pixels. y: as it is stored, in 16 bits a number; so few
    of those add up in float32 all but exactly, and the deviations are those from the mean itself."""
    RUNS: tl.constexpr = y.shape[0] // RUN
    y = y.reshape(RUNS, RUN, y.shape[1])
    mean = tl.sum(y, axis=1) / RUN
    d = y - mean[:, None, :]
    run = place * RUNS + tl.arange(0, RUNS)
    at = moments + run.to(tl.int64)[:, None] * (2 * n) + column[None, :]
    tl.store(at, mean, (column < n)[None, :])
    tl.store(at + n, tl.sum(d * d, axis=1), (column < n)[None, :])


@remembered
@triton.jit(do_not_specialize=["batch", "top", "left"])
def _conv2d(
    x, weight, bias, add, residual, y_ptr, moments, batch, height, width, n, channels, top, left,
    TAPS: tl.constexpr, TAPS_X: tl.constexpr, QUARTERS: tl.constexpr, SILU: tl.constexpr, SPLITS: tl.constexpr,
    BATCH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """x, weight: descriptors of [B, H, W, C] and [N, taps, C]. height and width of the result; with QUARTERS, where a
    program makes every second pixel of every second row, of the small picture. With SPLITS y_ptr is float32 [SPLITS, B,
    H, W, N]. moments: [B, H W / RUN, 2 N], where a tile is whole runs of RUN pixels of a picture."""
    ROWS: tl.constexpr = BATCH * HEIGHT * WIDTH
    blocks = tl.cdiv(n, COLUMNS)
    across = tl.cdiv(width, WIDTH)
    down = tl.cdiv(height, HEIGHT)
    place = tl.program_id(0) // blocks
    first_column = tl.program_id(0) % blocks * COLUMNS
    first_w = place % across * WIDTH
    first_h = place // across % down * HEIGHT
    first_sample = place // across // down * BATCH
    quarter = tl.program_id(1)
    if QUARTERS:  # what a pixel of the doubled picture sees begins one pixel further up, or not
        top = 1 - quarter // 2
        left = 1 - quarter % 2

    steps = tl.cdiv(channels, DEPTH)
    each = tl.cdiv(TAPS * steps, SPLITS)
    begin = tl.program_id(2) * each
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(begin, tl.minimum(begin + each, TAPS * steps)):
        tap = i // steps
        start = i % steps * DEPTH
        at = [first_sample, first_h + tap // TAPS_X - top, first_w + tap % TAPS_X - left, start]
        pixels = x.load(at).reshape(ROWS, DEPTH)  # zeros outside the picture, and behind the last channel
        w = weight.load([quarter * n + first_column, tap, start]).reshape(COLUMNS, DEPTH)
        y = tl.dot(pixels, w.T, y)

    row = tl.arange(0, ROWS)
    w_at = first_w + row % WIDTH
    h_at = first_h + row // WIDTH % HEIGHT
    sample = (first_sample + row // (WIDTH * HEIGHT)).to(tl.int64)
    inside = (sample < batch) & (h_at < height) & (w_at < width)
    if QUARTERS:
        pixel = (sample * height + h_at) * 2 + quarter // 2
        pixel = (pixel * width + w_at) * 2 + quarter % 2
    else:
        pixel = (sample * height + h_at) * width + w_at
    column = first_column + tl.arange(0, COLUMNS)
    inside = inside[:, None] & (column < n)[None, :]
    at = pixel[:, None] * n + column[None, :]
    if SPLITS > 1:
        whole = tl.cast(batch * height * width, tl.int64) * (n * (4 if QUARTERS else 1))
        tl.store(y_ptr + tl.program_id(2) * whole + at, y, inside)
    else:
        if add is not None and BATCH == 1:  # a row for all pixels, to which the bias is added before: fewer registers
            more = vector(add + tl.cast(first_sample, tl.int64) * n, column, n)
            y += more if bias is None else more + vector(bias, column, n)
        else:
            if bias is not None:
                y += vector(bias, column, n)
            if add is not None:
                y += tl.load(add + sample[:, None] * n + column[None, :], inside, other=0.0).to(tl.float32)
        if SILU:
            y = silu(y)
        if residual is not None:
            y += tl.load(residual + at, inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)
        if moments is not None:
            # Read again from the cache: each thread then has pixels of few channels, which take few exchanges to add,
            # where of the product it has channels of few pixels.
            tl.debug_barrier()
            y = tl.load(y_ptr + at, inside, other=0.0).to(tl.float32)
            _moments_of_runs(y, moments, place, column, n, RUN)


@triton.jit
def _pair(a, b, c, HALF: tl.constexpr, SECOND: tl.constexpr):
    """The sum of the kernel's taps, of three, that see the first or second of the two pixels of a small picture that
    the first or second half of a doubled pixel sees."""
    if HALF:
        return c if SECOND else a + b
    else:
        return b + c if SECOND else a


@remembered
@triton.jit
def _quarters(weight, out, size, channels, BLOCK: tl.constexpr):
    """weight: [N, 3, 3, C]; out: [4, N, 2, 2, C]; size: N C."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    n = (i // channels).to(tl.int64)
    at = weight + n * (9 * channels) + i % channels
    to = out + n * (4 * channels) + i % channels
    w00 = tl.load(at, inside).to(tl.float32)
    w01 = tl.load(at + channels, inside).to(tl.float32)
    w02 = tl.load(at + 2 * channels, inside).to(tl.float32)
    w10 = tl.load(at + 3 * channels, inside).to(tl.float32)
    w11 = tl.load(at + 4 * channels, inside).to(tl.float32)
    w12 = tl.load(at + 5 * channels, inside).to(tl.float32)
    w20 = tl.load(at + 6 * channels, inside).to(tl.float32)
    w21 = tl.load(at + 7 * channels, inside).to(tl.float32)
    w22 = tl.load(at + 8 * channels, inside).to(tl.float32)
    whole = tl.cast(size, tl.int64) * 4
    for quarter in tl.static_range(4):
        for tap in tl.static_range(4):
            left = _pair(w00, w10, w20, quarter // 2, tap // 2)
            middle = _pair(w01, w11, w21, quarter // 2, tap // 2)
            right = _pair(w02, w12, w22, quarter // 2, tap // 2)
            y = _pair(left, middle, right, quarter % 2, tap % 2)
            tl.store(to + quarter * whole + tap * channels, y.to(out.dtype.element_ty), inside)


def quarters_of(weight: Tensor) -> Tensor:
    """[N, C, 3, 3] -> [4 N, C, 2, 2], channels_last both: see diffkern/ops/conv2d.py. In each call, for a copy that is
    kept could not tell on a GPU, without waiting for it, whether its weight has changed."""
    n, channels = weight.shape[:2]
    out = torch.empty(
        4 * n, channels, 2, 2, device=weight.device, dtype=weight.dtype, memory_format=torch.channels_last
    )
    block = 1024
    with on_device(weight):
        _quarters[(cdiv(n * channels, block),)](weight, out, n * channels, channels, BLOCK=block)
    return out


def facts(size: int, pixels: int, n: int, channels: int, taps: int, upsample: bool) -> str:
    """What a table tells convolutions apart by: bytes of a number, pixels of a picture, results, channels and taps."""
    pixels = 1 << (pixels - 1).bit_length()
    return configs.key(bytes=size, pixels=pixels, n=n, channels=channels, taps=taps, upsample=int(upsample))


def _call(x: Tensor, weight: Tensor, upsample: bool) -> tuple[int, int, int, int, int, bool]:
    n, channels, *kernel = weight.shape
    return x.element_size(), x.shape[2] * x.shape[3], n, channels, kernel[0] * kernel[1], upsample


def tuning(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool, arch: int,
) -> tuple[str, list[configs.Shape]]:  # fmt: skip
    """For the op's arguments: the entry of the table that is theirs, and the shapes to try for it. The empty one is the
    library's convolution."""
    sides = (1, 1, 1, 1) if padding is None else tuple(padding) * (4 // len(padding))
    cuts = [] if arch < 90 or why_not(x, weight, stride, sides, upsample) else [cut._asdict() for cut in CUTS]
    return facts(*_call(x, weight, upsample)), [{}, *cuts]


@functools.cache
def _found(call: tuple[int, int, int, int, int, bool], arch: int) -> configs.Shape:
    entry = configs.tuned("conv2d", facts(*call), arch)
    return {} if entry is None else entry.shape


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sides: tuple[int, int, int, int], add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool, moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """activation(conv2d(x) + bias + add) + residual. sides: the zeros on the left, right, top and bottom of x. x,
    residual: contiguous or channels_last, which the result is too. None is empty. moments: for those of a channels_last
    result, see `epilogue`."""
    call = _call(x, weight, upsample)
    shape = configs.on_trial("conv2d", lambda: facts(*call))
    shape = _found(call, configs.architecture(x.device)) if shape is None else shape
    if moments is not None:
        shape = cut_with_moments(x, len(weight), stride, upsample) or shape
    cut = None if not shape or why_not(x, weight, stride, sides, upsample) else Cut(**shape)
    if cut and moments is not None and not gives_moments(cut, x, weight, sides, upsample, moments.shape[1]):
        cut = None
    if cut is None:
        return _by_library(x, weight, bias, stride, sides, add, residual, activation, upsample, moments)
    return fused(x, weight, bias, sides, add, residual, activation, upsample, cut, moments)


def _by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sides: tuple[int, int, int, int], add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool, moments: Tensor | None,
) -> Tensor:  # fmt: skip
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    last, kernel = layout is torch.channels_last, tuple(weight.shape[2:])
    bare = add is None and moments is None
    if last and kernel == (1, 1) and stride == 1 and not any(sides) and not upsample and bare:
        around = None if residual is None else residual.permute(0, 2, 3, 1)
        return linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias, activation, around, None).permute(0, 3, 1, 2)
    if last and kernel == (3, 3) and stride == 1 and sides == (1, 1, 1, 1) and upsample:
        weight = weight.contiguous(memory_format=torch.channels_last)
        four = F.conv2d(x, quarters_of(weight), None, padding=1).contiguous(memory_format=layout)
        batch, n, height, width = four.shape
        size = (batch, 2 * height - 2, 2 * width - 2, n // 4)
        y = torch.empty(size, device=x.device, dtype=x.dtype)
        around = None if residual is None else residual.permute(0, 2, 3, 1)
        epilogue(four.permute(0, 2, 3, 1), bias, add, activation, None, around, y, quarters=True, moments=moments)
        return y.permute(0, 3, 1, 2)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    left, right, top, bottom = sides
    if left != right or top != bottom:
        x, left, top = F.pad(x, sides), 0, 0
    y = F.conv2d(x, weight, None, stride, (top, left)).contiguous(memory_format=layout)
    if bias is None and bare and residual is None and activation == "none":
        return y
    rows, around = y.permute(0, 2, 3, 1) if last else y, residual
    around = around.permute(0, 2, 3, 1) if last and around is not None else around
    epilogue(rows, bias, add, activation, None, around, rows, pixels_first=last, moments=moments)
    return y


def _descriptor(x: Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
    """Of a dense tensor, in the order of its memory. Its own strides say nothing about sides of 1."""
    strides = [1]
    for side in shape[:0:-1]:
        strides.insert(0, strides[0] * side)
    return TensorDescriptor(x, shape, strides, block)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, sides: tuple[int, int, int, int], add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool, cut: Cut, moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`conv2d` in one kernel, of stride 1; x channels_last, C a multiple of 8. upsample: of 3 x 3 taps with zeros on
    each side. moments: only where the cut `gives_moments`."""
    left, _, top, _ = sides
    batch, n, (channels, taps_y, taps_x) = len(x), len(weight), weight.shape[1:]
    height, width = size_of(x, weight, sides)
    if upsample:
        weight, taps_y, taps_x = quarters_of(weight), 2, 2
    size = (batch, 2 * height, 2 * width, n) if upsample else (batch, height, width, n)
    y = torch.empty(size, device=x.device, dtype=x.dtype)
    columns, depth = (min(most, power_of_2(s)) for most, s in ((cut.COLUMNS, n), (cut.DEPTH, channels)))
    columns, depth = max(16, columns), max(16, depth)
    own = moments if cut.SPLITS == 1 else None  # else the pass behind has them
    run = 0 if own is None else height * width // own.shape[1]
    tile = tile_of(cut.ROWS, height, width, by_rows=own is not None)
    weight = weight.contiguous(memory_format=torch.channels_last)
    taps = taps_y * taps_x
    source = _descriptor(x, [batch, *x.shape[2:], channels], [*tile, depth])
    matrix = _descriptor(weight, [len(weight), taps, channels], [columns, 1, depth])
    part = y if cut.SPLITS == 1 else torch.empty(cut.SPLITS, *size, device=x.device)
    places = cdiv(batch, tile.BATCH) * cdiv(height, tile.HEIGHT) * cdiv(width, tile.WIDTH)
    around = None if residual is None else residual.permute(0, 2, 3, 1)
    with on_device(x):
        _conv2d[(places * cdiv(n, columns), 4 if upsample else 1, cut.SPLITS)](
            source, matrix, bias, add, around, part, own, batch, height, width, n, channels, top, left, TAPS=taps,
            TAPS_X=taps_x, QUARTERS=upsample, SILU=activation == "silu", SPLITS=cut.SPLITS, **tile._asdict(),
            COLUMNS=columns, DEPTH=depth, RUN=run, num_warps=cut.num_warps, num_stages=cut.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    if cut.SPLITS > 1:
        epilogue(part[0], bias, add, activation, None, around, y, splits=cut.SPLITS, moments=moments)
    return y.permute(0, 3, 1, 2)

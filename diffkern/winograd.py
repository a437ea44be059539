"""3 x 3 convolutions on the CPU by Winograd (Lavin & Gray 2016).

In tiles of 2 x 2 pixels it takes 16 multiplications for the 36 of the definition, or 9 for a picture that is doubled
first, in float32 and with about the error of oneDNN's own convolution. In tiles of 4 x 4 it takes 36 for 144, or 25,
and in tiles of 6 x 6 it takes 64 for 324, or 49: in float32 with ten and twenty times that error, which is still far
below what 16-bit tensors can tell. Of the weight nine numbers are kept for nine, and the points that they do not tell
are made in the cache.

In bfloat16, where the CPU multiplies integers of 16 bits twice as fast as float32, the points of 4 x 4 tiles are such
integers (csrc/cpu/winograd_integers.h). Rounding them makes two fifths of the error of rounding the result, or half of
it: with both, it is 1.1 times that of the latter alone.

An infinity in x, like one that a sum overflows to, comes out as NaN in some of the pixels that see it: differences of
infinities are taken on the way. In larger tiles, what is not finite reaches the pixels of the tiles that see it, and a
pixel far larger than its neighbours costs them digits: a few millionths of it, in integers a few ten-thousandths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffkern.layout import is_dense
from diffkern.packing import compute_dtype, packed, vectors


class Tile(NamedTuple):
    """The pixels on a side of a tile, 2, 4 or 6, and whether its points are integers of 16 bits, or else float32."""

    pixels: int
    integers: bool = False


def tile(
    weight: Tensor, stride: int, sides: tuple[int, ...], upsample: bool, size: tuple[int, int], dtype: torch.dtype
) -> Tile | None:
    """The tile with which Winograd's way computes this convolution faster than oneDNN does in `compute_dtype`, or None
    where it does not. size: H' and W'. The batch has no say: a sample alone must come out as it does in a batch."""
    n, channels, *kernel = weight.shape
    if kernel != [3, 3] or stride != 1 or (upsample and sides != (1, 1, 1, 1)):
        return None
    # Below 16 channels not even one vector is filled.
    if vectors() is None or channels < 16:
        return None
    pixels, weights = size[0] * size[1], n * channels
    native = compute_dtype(dtype, convolution=True) == dtype
    if dtype == torch.float32 or not native:
        # Below 4 x 4 pixels most of what is computed lies outside the picture: of few tiles, reading the weights and
        # making their points takes the time.
        if min(size) < 4 and weights > 1 << 16:
            return None
    # The transforms of a picture take longer than what they save where there are few products, results counted in
    # vectors, and where few results are made of many channels. For a small picture, to begin takes oneDNN longer.
    elif pixels > 256 and (channels * -(-n // 16) < 48 or (n <= 16 and channels > 128)):
        return None
    if dtype == torch.float32:
        return Tile(2)
    if native and torch.cpu._is_amx_tile_supported():  # it has not been timed against AMX
        return None
    if native and dtype == torch.bfloat16 and torch.cpu._is_vnni_supported():
        # The points of the weights are made anew for every block of tiles. One picture wins that back by four whole
        # tiles. One tile does where the weights are few; where they are not, several pictures do.
        whole = min(size) >= 4 and (pixels >= 64 or weights <= 1 << 17)
        return Tile(4, integers=True) if whole or weights <= 1 << 12 else None
    # In float32 they take twice as much memory: for one picture they are won back by 16 tiles whatever the weights, by
    # 4 where those are few.
    many = min(size) >= 8 and (weights <= 1 << 17 or pixels >= 256)
    if many or weights <= 1 << 12:
        return Tile(6 if _larger_pays(size, upsample) else 4)
    return None if native else Tile(2)


def _larger_pays(size: tuple[int, int], upsample: bool) -> bool:
    """Whether tiles of 6 x 6 have so much fewer points than those of 4 x 4, with what lies beyond the picture's edges,
    that it shows in the time. Of fewer than nine tiles the points of the weights take what is won."""
    points = {pixels: (pixels + 1 if upsample else pixels + 2) ** 2 for pixels in (4, 6)}
    four, six = (points[pixels] * -(-size[0] // pixels) * -(-size[1] // pixels) for pixels in (4, 6))
    return size[0] * size[1] >= 256 and six <= 0.93 * four


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, sides: tuple[int, ...], add: Tensor | None,
    residual: Tensor | None, silu: bool, upsample: bool, tile: Tile,
) -> Tensor:  # fmt: skip
    """The arguments of diffkern.conv2d, x and residual channels_last. Returns [B, N, H', W'], channels_last."""
    library, results, kept = torch.ops.diffkern_C, weight.shape[0], min(tile.pixels, 4)  # one copy for larger tiles
    copy = packed(
        [weight],
        ("winograd", upsample, kept),
        lambda: library.winograd_weight(weight if is_dense(weight) else weight.contiguous(), upsample, kept),
    )
    inverse = None
    if tile.integers:
        units = ("winograd units", upsample)
        inverse = packed([weight], units, lambda: library.winograd_units(copy, results, weight.shape[1], upsample))
    bias = None if bias is None else bias.contiguous()
    add = None if add is None else add.contiguous()
    return library.winograd.default(x, copy, results, sides, bias, add, silu, residual, upsample, tile.pixels, inverse)

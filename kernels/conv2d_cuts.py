"""How the convolution kernel cuts its result, and what it cannot take. No Triton here."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import configs
from .configs import power_of_2


class Cut(NamedTuple):
    """A program's tile of the result, pixels and channels, its step along the sums, and the number of programs that
    share the sums of a tile; compile-time."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int
    SPLITS: int = 1


# What is worth trying.
CUTS = (
    Cut(128, 128, 64, 8, 4),
    Cut(128, 64, 64, 4, 4),
    Cut(64, 128, 64, 4, 4),
    Cut(128, 128, 64, 8, 4, 2),
    Cut(128, 128, 64, 8, 4, 4),
    Cut(128, 128, 64, 8, 4, 12),
)


class Tile(NamedTuple):
    """The pixels of a program: so many samples, and of each so many rows of so many pixels; compile-time."""

    BATCH: int
    HEIGHT: int
    WIDTH: int


def tile_of(pixels: int, height: int, width: int, by_rows: bool = False) -> Tile:
    """A tile of so many pixels, a power of two, of pictures of this size: nearly square, or of rows as whole as may be,
    which is a run of pixels where it fits the picture."""
    wide = min(pixels if by_rows else 16, power_of_2(width))
    tall = min(pixels // wide, power_of_2(height))
    return Tile(pixels // (wide * tall), tall, wide)


def size_of(x: Tensor, weight: Tensor, sides: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the result, with a stride of 1; of the small picture where it is then doubled."""
    left, right, top, bottom = sides
    return x.shape[2] + top + bottom - weight.shape[2] + 1, x.shape[3] + left + right - weight.shape[3] + 1


def gives_moments(cut: Cut, x: Tensor, weight: Tensor, sides: tuple[int, ...], upsample: bool, chunks: int) -> bool:
    """Whether the kernel gives those of its result: in the pass behind sums that are split; or itself, from tiles that
    are whole runs of the equal ones that a picture is cut into. A tile of a doubled picture, of which a program makes
    every second pixel, is none. Where 16 does not divide the channels, a thread has an address for each number, and
    moments would not fit in its registers."""
    if cut.SPLITS > 1:
        return True
    height, width = size_of(x, weight, sides)
    tile = tile_of(cut.ROWS, height, width, by_rows=True)  # narrower than a picture only if it is of one row
    whole = tile.BATCH == 1 and height % tile.HEIGHT == 0 and width % tile.WIDTH == 0
    even = height * width % chunks == 0 and cut.ROWS % (height * width // chunks) == 0
    return whole and even and not upsample and len(weight) % 16 == 0


def why_not(x: Tensor, weight: Tensor, stride: int, sides: tuple[int, ...], upsample: bool) -> str | None:
    """The reason that the kernel cannot take a convolution, or None. It fetches tiles of pixels by descriptor."""
    if x.dtype == torch.float32:
        return "full precision has no tensor cores"
    if x.is_contiguous():
        return "takes channels_last"
    if stride != 1 or (upsample and (tuple(weight.shape[2:]) != (3, 3) or sides != (1, 1, 1, 1))):
        return "takes a stride of 1, and doubles pictures for 3 x 3 taps with a zero on each side"
    if x.shape[1] % 8 or x.storage_offset() * x.element_size() % 16:
        return "takes pixels of multiples of 16 bytes"
    if x.is_cuda and configs.architecture(x.device) < 90:
        return "needs the tensor memory accelerator of sm_90"
    return None

"""How the kernels of `group_norm_silu` cut a sample: by its own shape only."""

import functools
from math import gcd
from typing import Any, NamedTuple

from .common import cdiv, power_of_2

_TILE = 4096  # elements of a tile of the two-pass kernels
_ONE_PASS = {1024: 4, 4096: 4, 16384: 16}  # elements that one program keeps in registers, with how many warps
_CHUNKS = 256  # a group is cut into at most about this many: each program of `_apply` reads all their moments


class _Cut(NamedTuple):
    """How the channels are cut into slabs of whole groups, or each group into parts; compile-time."""

    PER_GROUP: int
    GROUPS: int  # in a slab
    PARTS: int  # of a group
    CHANNELS: int  # a power of two that holds a slab, or a part
    PIXELS: int


def _cut(per_group: int, pixels: int, channels: int, channels_last: bool) -> _Cut:
    """The cut of the two-pass kernels: long runs of memory, and as few padded lanes as that allows."""
    if not channels_last:  # a run is pixels of one channel
        run = min(_TILE, max(16, 4 ** ((pixels - 1).bit_length() + 1 >> 1)))  # powers of four: few variants
        width = min(_TILE // run, power_of_2(per_group))
        return _Cut(per_group, 1, cdiv(per_group, width), width, run)
    width = min(128, power_of_2(channels))
    groups = max(1, width // per_group)
    aligned = 8 // gcd(per_group, 8)  # groups that begin on 16 bytes
    groups -= groups % aligned if groups > aligned else 0
    parts = cdiv(per_group, width)
    return _Cut(per_group, groups, parts, width, _TILE // width)


@functools.lru_cache(1024)
def at_once(per_group: int, pixels: int) -> dict[str, Any] | None:
    """The compile-time shape and warps of `_one_pass`, or None if a group is too large for it."""
    width = power_of_2(per_group)
    size = next((size for size in _ONE_PASS if width * power_of_2(pixels) <= size), None)
    if size is None:
        return None
    return {**_Cut(per_group, 1, 1, width, size // width)._asdict(), "num_warps": _ONE_PASS[size]}


@functools.lru_cache(1024)
def in_two(num_groups: int, pixels: int, channels: int, channels_last: bool) -> tuple[int, int, int, dict[str, Any]]:
    """For the two passes: a sample's slabs, the chunks of each, the moments of a group, and the compile-time shape."""
    cut = _cut(channels // num_groups, pixels, channels, channels_last)
    most = max(1, _CHUNKS // cut.PARTS)
    tiles = power_of_2(cdiv(cdiv(pixels, cut.PIXELS), most))
    if cut.GROUPS > 1 and pixels > 64 * cut.PIXELS:
        tiles = max(tiles, 2)  # folding many groups is worth it for a longer chunk only
    chunks = cdiv(pixels, cut.PIXELS * tiles)
    return cdiv(num_groups, cut.GROUPS) * cut.PARTS, chunks, cut.PARTS * chunks, {**cut._asdict(), "TILES": tiles}

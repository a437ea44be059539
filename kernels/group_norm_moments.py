"""The moments of groups, from those of channels that whoever made the inputs of a GroupNorm gives with them: see
`epilogue`. A few numbers in place of the picture, which the norm then reads once."""

import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, power_of_2
from .launch import remembered

_TILE = 1024  # moments that a program reads at a time


@triton.jit
def _given(moments, skip_moments, add, sample, first, chunk, c, own, channels, pixels, chunks, PER_GROUP: tl.constexpr):
    """For chunks [CHUNKS, 1] and channels [1, CHANNELS] of a group: (pixels, 0 outside, means with `add`, squares)."""
    there = (chunk < chunks) & (c < PER_GROUP)
    channel = first + c
    mine = there & (channel < own)
    at = moments + (sample * chunks + chunk) * (2 * own) + channel
    mean = tl.load(at, mine, other=0.0)
    squares = tl.load(at + own, mine, other=0.0)
    if skip_moments is not None:
        rest = channels - own
        at = skip_moments + (sample * chunks + chunk) * (2 * rest) + (channel - own)
        mean += tl.load(at, there & (channel >= own), other=0.0)
        squares += tl.load(at + rest, there & (channel >= own), other=0.0)
    if add is not None:
        mean += tl.load(add + sample * channels + channel, c < PER_GROUP, other=0.0).to(tl.float32)
    length = tl.cdiv(pixels, chunks)
    n = tl.minimum(pixels - chunk.to(tl.int64) * length, length).to(tl.float32)
    return tl.where(there, n, 0.0), tl.where(there, mean, 0.0), squares


@remembered
@triton.jit
def _pool(
    moments, skip_moments, add, pooled, own, channels, pixels, chunks, groups, half,
    PER_GROUP: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """moments, skip_moments: [B, chunks, twice the channels of each], of runs of ceil(pixels / chunks) pixels. pooled:
    [2, B, groups], as `_moments` writes of one chunk."""
    sample = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * PER_GROUP
    c = tl.arange(0, CHANNELS)[None, :]
    chunk = tl.arange(0, CHUNKS)[:, None]
    n, mean, squares = _given(moments, skip_moments, add, sample, first, chunk, c, own, channels, pixels, chunks,
                              PER_GROUP)  # fmt: skip
    shift = tl.sum(tl.sum(n * mean, axis=1), axis=0) / tl.sum(tl.sum(n, axis=1), axis=0)
    d = mean - shift
    nd = n * d
    squares += nd * d
    for start in range(CHUNKS, chunks, CHUNKS):
        n, mean, more = _given(moments, skip_moments, add, sample, first, start + chunk, c, own, channels, pixels,
                               chunks, PER_GROUP)  # fmt: skip
        d = mean - shift
        nd += n * d
        squares += more + n * d * d
    count = tl.cast(pixels, tl.float32) * PER_GROUP
    rest = tl.sum(tl.sum(nd, axis=1), axis=0) / count
    tl.store(pooled + tl.program_id(0), shift + rest)
    tl.store(pooled + half + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0) - rest * rest * count)


def pool(
    moments: Tensor, skip_moments: Tensor | None, add: Tensor | None, pooled: Tensor, own: int, channels: int,
    pixels: int, num_groups: int,
) -> None:  # fmt: skip
    """The mean and the squared deviations of the groups of cat(x, skip) + add into pooled, float32 [2, B, groups].
    own, channels: of x, and of both."""
    batch, chunks = moments.shape[:2]
    per_group = channels // num_groups
    width = power_of_2(per_group)
    tall = max(1, min(_TILE // width, power_of_2(chunks)))
    with on_device(moments):
        _pool[(batch * num_groups,)](
            moments, skip_moments, add, pooled, own, channels, pixels, chunks, num_groups, batch * num_groups,
            PER_GROUP=per_group, CHANNELS=width, CHUNKS=tall, num_warps=4 if width <= _TILE else 16,
            enable_fp_fusion=True,
        )  # fmt: skip

"""GroupNorm + SiLU for contiguous and channels_last tensors, any channel and group count, with a second input joined
by its channels, an addition before the norm and a modulation after it.

Tiles are [pixels, channels] whatever the layout, with the strides as run-time numbers. A group that fits into one tile
is read once (`_one_pass`). Else `_moments` writes the mean and the squared deviations of every chunk, and `_apply`
folds the chunks of its groups in a fixed order, then normalises. How a sample is cut depends on its own shape only, so
that a sample's result does not depend on its batch. The second moment is centred: nothing cancels far from zero.
Where whoever made the inputs gives the moments of their channels, `pool` makes those of groups in place of `_moments`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, power_of_2, shifted_moments
from .group_norm_blocks import tuning
from .group_norm_cuts import at_once, in_two
from .group_norm_moments import pool
from .launch import remembered

__all__ = ["group_norm_silu", "tuning"]


@triton.jit
def _slab(
    program, channels, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """(first group, part, first channel, mask of the channels, [CHANNELS, GROUPS] membership) of a slab of a sample."""
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    group = program // PARTS * GROUPS
    part = program % PARTS
    first = group * PER_GROUP + part * CHANNELS
    c = tl.arange(0, CHANNELS)
    mask = (c < GROUPS * PER_GROUP - part * CHANNELS) & (first + c < channels)
    member = (c[:, None] // PER_GROUP == tl.arange(0, PADDED)[None, :]) & mask[:, None]
    return group, part, first, mask, member


@triton.jit
def _input(
    x, skip, add, sample, first, start, c, p, c_mask, inside, own, channels, pixels, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """float32 [pixels, channels]: the tile of cat(x, skip) + add from channel `first` and pixel `start` on, zero
    outside. Only the tile's place is int64, the offsets inside it are int32."""
    channel_stride = 1 if CHANNELS_LAST else pixels
    pixel_stride = own if CHANNELS_LAST else 1
    corner = sample * own * pixels + first.to(tl.int64) * channel_stride + start * pixel_stride
    here = inside
    if skip is not None:
        here = inside & (first + c < own)[None, :]
    u = tl.load(x + corner + (c[None, :] * channel_stride + p[:, None] * pixel_stride), here, other=0.0).to(tl.float32)
    if skip is not None:
        rest = channels - own
        pixel_stride = rest if CHANNELS_LAST else 1
        corner = sample * rest * pixels + (first - own).to(tl.int64) * channel_stride + start * pixel_stride
        offset = c[None, :] * channel_stride + p[:, None] * pixel_stride
        u += tl.load(skip + corner + offset, inside & (first + c >= own)[None, :], other=0.0).to(tl.float32)
    if add is not None:
        added = tl.load(add + sample * channels + first + c, c_mask, other=0.0).to(tl.float32)
        u = tl.where(inside, u + added[None, :], 0.0)
    return u


@triton.jit
def _output_offset(sample, first, start, c, p, channels, pixels, CHANNELS_LAST: tl.constexpr):
    channel_stride = 1 if CHANNELS_LAST else pixels
    pixel_stride = channels if CHANNELS_LAST else 1
    corner = sample * channels * pixels + first.to(tl.int64) * channel_stride + start * pixel_stride
    return corner + (c[None, :] * channel_stride + p[:, None] * pixel_stride)


@triton.jit
def _to_groups(per_channel, member):
    return tl.sum(tl.where(member, per_channel[:, None], 0.0), axis=0)


@triton.jit
def _to_channels(per_group, member):
    return tl.sum(tl.where(member, per_group[None, :], 0.0), axis=1)


@triton.jit
def _group_moments(n, mean, m2, member):
    """Fold per-channel moments, n elements each, into groups: (channels of the group here, mean, squares)."""
    width = tl.maximum(tl.sum(member.to(tl.float32), axis=0), 1.0)
    group_mean = _to_groups(mean, member) / width
    delta = mean - _to_channels(group_mean, member)
    return width, group_mean, _to_groups(m2 + n * delta * delta, member)


@triton.jit
def _normalise(x, mean, m2, count, eps, weight, bias, scale, shift, sample, first, c, c_mask, channels, member,
               SILU: tl.constexpr):  # fmt: skip
    gain = _to_channels(tl.rsqrt(m2 / count + tl.cast(eps, tl.float32)), member)
    centre = _to_channels(mean, member)
    offset = tl.zeros_like(gain)
    if weight is not None:
        gain *= tl.load(weight + first + c, c_mask, other=0.0).to(tl.float32)
        offset = tl.load(bias + first + c, c_mask, other=0.0).to(tl.float32)
    if scale is not None:
        at = sample * channels + first + c
        factor = 1 + tl.load(scale + at, c_mask, other=0.0).to(tl.float32)
        gain *= factor
        offset = offset * factor + tl.load(shift + at, c_mask, other=0.0).to(tl.float32)
    y = (x - centre[None, :]) * gain[None, :] + offset[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    return y


@remembered
@triton.jit
def _one_pass(
    x_ptr, skip, add, y_ptr, weight, bias, scale, shift, eps, own, channels, pixels, slabs,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // slabs).to(tl.int64)
    _, _, first, c_mask, member = _slab(program % slabs, channels, PER_GROUP, GROUPS, PARTS, CHANNELS)
    c = tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    inside = (p < pixels)[:, None] & c_mask[None, :]
    x = _input(x_ptr, skip, add, sample, first, 0, c, p, c_mask, inside, own, channels, pixels, CHANNELS_LAST)
    n = tl.cast(pixels, tl.float32)
    shift_by = tl.sum(x, axis=0) / n
    d = tl.where(inside, x - shift_by[None, :], 0.0)
    mean, m2 = shifted_moments(n, shift_by, d, d * d)
    width, mean, m2 = _group_moments(n, mean, m2, member)
    y = _normalise(x, mean, m2, width * n, eps, weight, bias, scale, shift, sample, first, c, c_mask, channels, member,
                   SILU)  # fmt: skip
    offset = _output_offset(sample, first, 0, c, p, channels, pixels, CHANNELS_LAST)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)


@remembered
@triton.jit
def _moments(
    x_ptr, skip, add, partial, own, channels, pixels, slabs, groups, half,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    TILES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """partial: [2, B, groups, PARTS * chunks]: the means, then from `half` on the sums of squared deviations."""
    sample = (tl.program_id(0) // slabs).to(tl.int64)
    group, part, first, c_mask, member = _slab(tl.program_id(0) % slabs, channels, PER_GROUP, GROUPS, PARTS, CHANNELS)
    start = tl.program_id(1).to(tl.int64) * (PIXELS * TILES)
    c = tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    left = pixels - start
    inside = (p < left)[:, None] & c_mask[None, :]
    x = _input(x_ptr, skip, add, sample, first, start, c, p, c_mask, inside, own, channels, pixels, CHANNELS_LAST)
    shift = tl.sum(x, axis=0) / tl.minimum(left, PIXELS).to(tl.float32)
    d = tl.where(inside, x - shift[None, :], 0.0)
    d2 = d * d
    for t in range(1, TILES):
        at = start + t * PIXELS
        inside = (p < left - t * PIXELS)[:, None] & c_mask[None, :]
        x = _input(x_ptr, skip, add, sample, first, at, c, p, c_mask, inside, own, channels, pixels, CHANNELS_LAST)
        more = tl.where(inside, x - shift[None, :], 0.0)
        d += more
        d2 += more * more
    n = tl.minimum(left, PIXELS * TILES).to(tl.float32)
    mean, m2 = shifted_moments(n, shift, d, d2)
    _, group_mean, group_m2 = _group_moments(n, mean, m2, member)
    g = tl.arange(0, group_mean.shape[0])
    chunks = tl.num_programs(1)
    entry = (sample * groups + group + g) * (PARTS * chunks) + part * chunks + tl.program_id(1)
    mask = (g < GROUPS) & (group + g < groups)
    tl.store(partial + entry, group_mean, mask)
    tl.store(partial + half + entry, group_m2, mask)


@remembered
@triton.jit
def _apply(
    x_ptr, skip, add, y_ptr, partial, weight, bias, scale, shift, eps, own, channels, pixels, slabs, groups, half,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    TILES: tl.constexpr, CHANNELS_LAST: tl.constexpr, ENTRIES: tl.constexpr, POOLED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    # Backwards: what `_moments` read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunks = tl.num_programs(1)
    chunk = chunks - 1 - tl.program_id(1)
    sample = (program // slabs).to(tl.int64)
    group, _, first, c_mask, member = _slab(program % slabs, channels, PER_GROUP, GROUPS, PARTS, CHANNELS)

    count = tl.cast(pixels, tl.float32) * PER_GROUP
    if POOLED:
        g = tl.arange(0, member.shape[1])
        entry = sample * groups + group + g
        there = (g < GROUPS) & (group + g < groups)
        mean = tl.load(partial + entry, there, other=0.0)
        m2 = tl.load(partial + half + entry, there, other=0.0)
    else:
        e = tl.arange(0, ENTRIES)[:, None]
        g = tl.arange(0, member.shape[1])[None, :]
        entry = (sample * groups + group + g) * (PARTS * chunks) + e
        there = (e < PARTS * chunks) & (g < GROUPS) & (group + g < groups)
        width = tl.minimum(PER_GROUP - e // chunks * CHANNELS, CHANNELS) if PARTS > 1 else PER_GROUP
        height = tl.minimum(pixels - (e % chunks).to(tl.int64) * (PIXELS * TILES), PIXELS * TILES)
        n = tl.where(there, (width * height).to(tl.float32), 0.0)
        means = tl.load(partial + entry, there, other=0.0)
        mean = tl.sum(n / count * means, axis=0)
        delta = means - mean[None, :]
        m2 = tl.sum(tl.load(partial + half + entry, there, other=0.0) + n * delta * delta, axis=0)

    start = chunk.to(tl.int64) * (PIXELS * TILES)
    c = tl.arange(0, CHANNELS)
    p = tl.arange(0, PIXELS)
    for t in range(TILES):
        at = start + t * PIXELS
        inside = (p < pixels - at)[:, None] & c_mask[None, :]
        x = _input(x_ptr, skip, add, sample, first, at, c, p, c_mask, inside, own, channels, pixels, CHANNELS_LAST)
        y = _normalise(x, mean, m2, count, eps, weight, bias, scale, shift, sample, first, c, c_mask, channels, member,
                       SILU)  # fmt: skip
        offset = _output_offset(sample, first, at, c, p, channels, pixels, CHANNELS_LAST)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    add: Tensor | None, scale: Tensor | None, shift: Tensor | None, skip: Tensor | None, moments: Tensor | None,
    skip_moments: Tensor | None,
) -> Tensor:  # fmt: skip
    """silu(group_norm(cat(x, skip) + add) * (1 + scale) + shift); weight and bias, scale and shift both or neither.
    moments: None, or those of x, see `epilogue`, and of skip if there is one."""
    if skip is not None and not skip.shape[1]:
        skip = skip_moments = None
    batch, own = x.shape[:2]
    channels = own + (0 if skip is None else skip.shape[1])
    channels_last = not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty((batch, channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout)
    if not y.numel():
        return y
    pixels = x.shape[2:].numel()
    source, sizes = (x, skip, add), (own, channels, pixels)
    parameters = (weight, bias, scale, shift, eps)
    flags = {"CHANNELS_LAST": channels_last, "enable_fp_fusion": True}
    shape = at_once(channels // num_groups, pixels)
    with on_device(x):
        if shape is not None:
            _one_pass[(batch * num_groups,)](*source, y, *parameters, *sizes, num_groups, **shape, **flags, SILU=silu)
            return y
        slabs, chunks, of_group, shape = in_two(num_groups, pixels, channels, channels_last)
        pooled = moments is not None
        entries = 1 if pooled else max(16, power_of_2(of_group))
        half = batch * num_groups * (1 if pooled else of_group)
        partial = torch.empty(2 * half, device=x.device, dtype=torch.float32)
        launch, place = (batch * slabs, chunks), (*sizes, slabs, num_groups, half)
        if moments is not None:
            pool(moments, skip_moments, add, partial, *sizes, num_groups)
        else:
            _moments[launch](*source, partial, *place, **shape, **flags)
        _apply[launch](*source, y, partial, *parameters, *place, **shape, **flags, ENTRIES=entries, POOLED=pooled,
                       SILU=silu)  # fmt: skip
    return y

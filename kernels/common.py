"""What the kernels share: the noise counter, moments, and tiles over a sample in either layout.

FAST picks the GPU's approximate log2, sine and cosine: 28 instructions a normal where the exact ones take 129. The
integers are the same; the normals differ by at most about 1e-5. The interpreter has no such instructions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .configs import power_of_2

NORMALS = tl.constexpr(4)  # that one Philox counter gives
_GRID_LIMIT = tl.constexpr(65535)  # of CUDA's second and third grid axis

on_device = torch.cuda.device_of  # a launch goes to the current device, which need not be the tensor's


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. For launchers: Triton's own, which kernels also call, takes as long as half a launch there."""
    return -(-a // b)


def grid(batch: int, chunks: int) -> tuple[int, int, int]:
    """Programs for a batch: chunks of one sample are neighbours, and no program divides to learn its sample."""
    return chunks, min(batch, _GRID_LIMIT.value), cdiv(batch, _GRID_LIMIT.value)


@triton.jit
def sample_index():
    """The sample of this program of a `grid`; at or above the batch size for the last few. int64: it scales offsets."""
    return tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * _GRID_LIMIT


@triton.jit
def shifted_moments(n, shift, d, d2):
    """Mean and sum of squared deviations per channel, from the deviations from `shift` of n pixels [pixels, channels].
    With the shift the mean of a share s of them, rounding grows by 1 + 1 / s at most, whatever the data."""
    rest = tl.sum(d, axis=0) / n
    return shift + rest, tl.sum(d2, axis=0) - rest * rest * n


@triton.jit
def philox_words(keys, sample, draw, block):
    """The four random words of each counter `block` (uint32) of a sample's noise `draw`; keys: int64 [B, 2]."""
    seed = tl.load(keys + 2 * sample)
    stream = tl.load(keys + 2 * sample + 1)
    return tl.philox(seed, block, tl.cast(draw, tl.uint32), stream.to(tl.uint32), (stream >> 32).to(tl.uint32))


@triton.jit
def box_muller(radius_word, angle_word, FAST: tl.constexpr):
    """Two normals, cosine first. The uniforms are (r + 1/2) 2^-32 rounded once: in (0, 1], so the logarithm is finite.
    The angle is centred: the approximate sine and cosine are accurate in [-pi, pi] only."""
    u = radius_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    angle = (angle_word.to(tl.float32) * 2.0**-32 + 2.0**-33 - 0.5) * 6.283185307179586
    if FAST:
        # Near 1 the approximate log2 has an absolute error only, which the root would blow up: a series there.
        gap = 1 - u
        series = gap * (2 + gap * (1 + gap * (2 / 3 + gap * 0.5)))
        radius = tl.sqrt(tl.where(gap < 1 / 32, series, libdevice.fast_log2f(u) * -1.3862943611198906))
        return radius * libdevice.fast_cosf(angle), radius * libdevice.fast_sinf(angle)
    else:
        radius = tl.sqrt_rn(-2 * tl.log(u))
        return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normal_run(keys, sample, draw, block, FAST: tl.constexpr):
    """The four normals of each counter, as [..., 2, 2]: a reshape puts them in the order of their elements."""
    w0, w1, w2, w3 = philox_words(keys, sample, draw, block)
    a, b = box_muller(w0, w1, FAST)
    c, d = box_muller(w2, w3, FAST)
    return tl.join(tl.join(a, c), tl.join(b, d))


def tile_of(x: torch.Tensor, size: int, by_counter: bool = True) -> dict[str, Any]:
    """The compile-time shape of tiles of about `size` elements over samples laid out as x (contiguous or
    channels_last). Only noise cares about the layout: without it (by_counter false) a sample is a run of memory."""
    if x.is_contiguous() or not by_counter:
        return {"CHANNELS": 0, "COLUMNS": 1, "ROWS": size, "QUADS": True}
    columns = min(power_of_2(x.shape[1]), 64)
    quads = x.shape[2] * x.shape[3] % NORMALS.value == 0
    rows = size // columns // (1 if quads else NORMALS.value)  # one counter an element, then: four times the work
    return {"CHANNELS": x.shape[1], "COLUMNS": columns, "ROWS": rows, "QUADS": quads}


def chunks_of(n: int, CHANNELS: int, COLUMNS: int, ROWS: int, QUADS: bool) -> int:
    """How many such tiles cover a sample of n elements."""
    return cdiv(n // max(CHANNELS, 1), ROWS) * cdiv(max(CHANNELS, 1), COLUMNS)


@triton.jit
def tile(sample, n, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Where this program's tile lies: offsets from the tensor's first element (int64) and their mask."""
    chunk = tl.program_id(0).to(tl.int64)
    if CHANNELS == 0:
        offset = chunk * ROWS + tl.arange(0, ROWS)
        return sample * n + offset, offset < n
    else:
        strips: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
        pixel = chunk // strips * ROWS + tl.arange(0, ROWS)[:, None]
        channel = (chunk % strips).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        return sample * n + pixel * CHANNELS + channel, (pixel * CHANNELS < n) & (channel < CHANNELS)


@triton.jit
def tile_normals(
    keys, sample, draw, n, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The noise of `tile`. A counter names four neighbours in logical (NCHW) order, whatever the layout."""
    chunk = tl.program_id(0).to(tl.int64)
    if CHANNELS == 0:
        block = (chunk * (ROWS // NORMALS)).to(tl.uint32) + tl.arange(0, ROWS // NORMALS).to(tl.uint32)
        return tl.reshape(normal_run(keys, sample, draw, block, FAST), [ROWS])
    else:
        strips: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
        channel = (chunk % strips).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        first = chunk // strips * ROWS
        pixels = n // CHANNELS
        if QUADS:  # four pixels of one channel share a counter
            quad = first // NORMALS + tl.arange(0, ROWS // NORMALS)[:, None]
            block = (channel * (pixels // NORMALS) + quad).to(tl.uint32)
            lanes = tl.reshape(normal_run(keys, sample, draw, block, FAST), [ROWS // NORMALS, COLUMNS, NORMALS])
            return tl.reshape(tl.permute(lanes, [0, 2, 1]), [ROWS, COLUMNS])
        else:  # every element works out its own counter and keeps one normal of four
            element = channel.to(tl.int64) * pixels + first + tl.arange(0, ROWS)[:, None]
            w0, w1, w2, w3 = philox_words(keys, sample, draw, (element // NORMALS).to(tl.uint32))
            second = element % NORMALS >= 2
            cosine, sine = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), FAST)
            return tl.where(element % 2 == 1, sine, cosine)

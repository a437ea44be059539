"""A term of the variational bound: prediction, clip, KL or negative log-likelihood, and their sum over a sample.

A program sums one run of a sample; if there is more than one, `_fold` adds the runs in order. How a sample is cut
depends on its size alone. Exponentials of float32's own accuracy rather than the GPU's approximate ones: at a variance
that all elements share, their errors would all have one sign. The columns of a row are those of the op
(diffkern/ops/vlb_term.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, grid, on_device, power_of_2, sample_index
from .launch import remembered

_TILE, _RUN = 1024, 4096  # elements of a turn of the loop, and of a program at most
_WIDTH = tl.constexpr(16)
_A, _B, _CLIP, _C1, _K0, _VAR, _LOGVAR_MIN, _LOGVAR_MAX, _BIN = (tl.constexpr(i) for i in range(9))


@triton.jit
def _exp_parts(x):
    """(2^n, f, q) with e^x = 2^n (1 + f + q), not rounded yet: |f| < 0.35, |q| < 0.08. Fit: 5.2e-11."""
    x = tl.where(x > 88.7, 88.7, tl.where(x < -87.3, -87.3, x))  # comparisons that are false for NaN leave it there
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    exact = x - n * 0.693145751953125  # the product has few bits
    rest = n * 1.428606820309417e-06
    f = exact - rest
    p = 0.00019790521 * f + 0.00139446601
    p = p * f + 0.00833349669
    p = p * f + 0.0416662949
    p = p * f + 0.166666659
    p = p * f + 0.500000007
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power, f, p * (f * f) + ((exact - f) - rest)


@triton.jit
def _exp(x):
    power, f, q = _exp_parts(x)
    return power + power * (f + q)


@triton.jit
def _upper(x):
    """x without its lower 12 bits: products of two of these are exact."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _sum(x):
    """The sum of a tile: the parts of its elements above a common power of two add without rounding, and the rest is
    small."""
    plain = tl.sum(x)
    exponent = tl.max(tl.abs(x)).to(tl.int32, bitcast=True) >> 23
    anchor = ((exponent + 12) << 23).to(tl.float32, bitcast=True) * 1.5  # above the sum of 1024 elements
    above = (x + anchor) - anchor
    split = tl.sum(above) + tl.sum(x - above)
    return tl.where(tl.abs(plain) < 1e30, split, plain)  # infinity and NaN have no parts


@triton.jit
def _log(u):
    """fast_log of csrc/common/math.h: the GPU's approximate one has an absolute error only, where u is near 1."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1
    p = -0.0763450290965 * f + 0.127615773481
    p = p * f - 0.131601804663
    p = p * f + 0.142017579983
    p = p * f - 0.16623357535
    p = p * f + 0.200012268731
    p = p * f - 0.250008210285
    p = p * f + 0.333333317078
    return e.to(tl.float32) * 0.693147180559945 + (f + f * f * (p * f - 0.5))


@triton.jit
def _scaled_tail(x):
    """e^(x^2 / 2) Q(x) for x >= 0: fast_scaled_tail of csrc/common/math.h."""
    t = 1 / (1 + 0.28 * x)
    p = -0.0143789754464 * t + 0.0715650104987
    p = p * t - 0.126027823603
    p = p * t + 0.0813720098165
    p = p * t - 0.0296185820091
    p = p * t + 0.0459096990262
    p = p * t + 0.0591993153818
    p = p * t + 0.0856357347758
    p = p * t + 0.102935729121
    p = p * t + 0.111704047521
    p = p * t + 0.111703837835
    return p * t


@triton.jit
def _bin_nll(x0, gap, width, precision, log_bin):
    """-log of the mass of a bin, in the cases of the reference; log_bin = log(2 width precision)."""
    lowest = x0 <= width - 1
    highest = x0 >= 1 - width
    edge = lowest | highest
    distance = tl.abs(gap)
    nearest = tl.where(lowest, -gap, tl.where(highest, gap, distance))
    a = (nearest - width) * precision
    b = (distance + width) * precision
    h = width * precision
    y = nearest * precision
    yh = y * h
    tail = a > 0
    size = tl.where(edge, 1.0, tl.maximum(h, yh))
    narrow = size < 0.25
    half_square = 0.5 * a * a

    near = _scaled_tail(tl.abs(a)) * _exp(tl.where(tail, 0.0, -half_square))
    beyond = _scaled_tail(b) * _exp(tl.where(tail, -2 * yh, -0.5 * b * b))
    far = tl.where(edge, 0.0, beyond)

    yy = yh * yh
    hh = h * h  # h^2k He_2k(y) / (2k + 1)!
    series = yy * (yy * (yy - 15 * hh) + 45 * hh * hh) - 15 * hh * hh * hh
    series = series * (1 / 5040) + (yy * (yy - 6 * hh) + 3 * hh * hh) * (1 / 120) + (yy - hh) * (1 / 6)

    more = tl.where(narrow, series, -(near + far))
    plain = tail & (size >= 0.25)
    u = tl.where(plain, near - far, 1 + more)
    rounded = tl.where(plain, 0.0, (more - (u - 1)) / u)  # what 1 + lost
    base = tl.where(narrow, log_bin - (0.5 * y * y + 0.918938533), tl.where(tail, -half_square, 0.0))
    return -(base + (_log(u) + rounded))


@triton.jit
def _read(x0_ptr, x_t_ptr, output_ptr, r, sample, start, n, channels, LEARNED: tl.constexpr,
          CHANNELS_LAST: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """(x_0, x_0 - x0_hat, logvar above the row's lowest, mask) of a tile of a sample."""
    offset = start + tl.arange(0, TILE)
    mask = offset < n
    x0 = tl.load(x0_ptr + sample * n + offset, mask, other=0.0).to(tl.float32)
    x_t = tl.load(x_t_ptr + sample * n + offset, mask, other=0.0).to(tl.float32)
    above = tl.zeros_like(x0)
    at = sample * n + offset
    if LEARNED:
        at += sample * n
        between = n  # m and its v
        if CHANNELS_LAST:
            at += offset // channels * channels
            between = channels
        v = tl.load(output_ptr + at + between, mask, other=0.0).to(tl.float32)
        above = (v + 1) * 0.5 * (tl.load(r + _LOGVAR_MAX) - tl.load(r + _LOGVAR_MIN))
    m = tl.load(output_ptr + at, mask, other=0.0).to(tl.float32)
    clip = tl.load(r + _CLIP)
    x0_hat = tl.load(r + _A) * x_t + tl.load(r + _B) * m
    x0_hat = tl.minimum(x0_hat, clip, propagate_nan=tl.PropagateNan.ALL)
    x0_hat = tl.maximum(x0_hat, -clip, propagate_nan=tl.PropagateNan.ALL)
    return x0, x0 - x0_hat, above, mask


@remembered
@triton.jit(do_not_specialize=["batch", "rows"])
def _terms(
    x0_ptr, x_t_ptr, output_ptr, table, timestep, out, batch, n, channels, rows,
    LEARNED: tl.constexpr, CHANNELS_LAST: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    sample = sample_index()
    if sample >= batch:
        return
    first = tl.program_id(0).to(tl.int64) * RUN
    row = tl.load(timestep + sample)
    if (row < 0) | (row >= rows):  # never outside the table
        tl.store(out + sample * tl.num_programs(0) + tl.program_id(0), float("nan"))
        return
    r = table + row * _WIDTH
    low = tl.load(r + (_LOGVAR_MIN if LEARNED else _LOGVAR_MAX))
    width = tl.load(r + _BIN)
    total = tl.zeros([TILE], tl.float32)
    if width > 0:
        scale, f, q = _exp_parts(-0.5 * low)
        log_bin = _log(2 * width) - 0.5 * low
        for i in range(0, RUN, TILE):
            x0, gap, above, mask = _read(
                x0_ptr, x_t_ptr, output_ptr, r, sample, first + i, n, channels, LEARNED, CHANNELS_LAST, TILE
            )
            precision = scale + scale * (f + q)
            if LEARNED:  # both exponentials, rounded once
                more, g, h = _exp_parts(-0.5 * above)
                precision = scale * more + scale * more * ((f + q) + ((g + h) + (f + q) * (g + h)))
            total += tl.where(mask, _bin_nll(x0, gap, width, precision, log_bin - 0.5 * above), 0.0)
        result = _sum(total)
    else:
        weight = tl.load(r + _C1)
        power, f, q = _exp_parts(-low)
        precision = power + power * (f + q)
        whole = tl.load(r + _VAR) * power
        ratio = whole + whole * (f + q)  # VAR precision
        # K0 + low + VAR precision, what all elements share: nearly zero when the variances are nearly equal.
        parts = (whole - _upper(whole)) * _upper(f) + whole * (f - _upper(f)) + whole * q
        shared = ((tl.load(r + _K0) + low) + whole) + _upper(whole) * _upper(f) + parts
        for i in range(0, RUN, TILE):
            _, gap, above, mask = _read(
                x0_ptr, x_t_ptr, output_ptr, r, sample, first + i, n, channels, LEARNED, CHANNELS_LAST, TILE
            )
            d = weight * gap
            if LEARNED:
                scale, g, h = _exp_parts(-above)
                e = scale + scale * (g + h)
                part = (above + ratio * tl.where(scale == 1, g + h, e - 1)) + d * d * (precision * e)
            else:
                part = d * d
            total += tl.where(mask, part, 0.0)
        count = tl.minimum(n - first, RUN).to(tl.float32)
        result = 0.5 * (count * shared + _sum(total) * (1 if LEARNED else precision))
    tl.store(out + sample * tl.num_programs(0) + tl.program_id(0), result)


@remembered
@triton.jit
def _fold(parts, out, chunks, ENTRIES: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ENTRIES)
    tl.store(out + sample, tl.sum(tl.load(parts + sample * chunks + i, i < chunks, other=0.0)))


def vlb_term(x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, timestep: Tensor) -> Tensor:
    """The term of each sample: float32 [B]."""
    batch = x0.shape[0]
    if not x0.numel():
        return torch.zeros(batch, dtype=torch.float32, device=x0.device)
    n, channels = x0.numel() // batch, x0.shape[1]
    learned = model_output.shape[1] != channels
    run = min(_RUN, cdiv(n, _TILE) * _TILE)
    chunks = cdiv(n, run)
    parts = torch.empty(batch, chunks, dtype=torch.float32, device=x0.device)
    with on_device(x0):
        _terms[grid(batch, chunks)](
            x0, x_t, model_output, table, timestep, parts, batch, n, channels, table.shape[0],
            LEARNED=learned, CHANNELS_LAST=learned and not x0.is_contiguous(), TILE=_TILE, RUN=run,
            enable_fp_fusion=True,
        )  # fmt: skip
        if chunks == 1:
            return parts.view(batch)
        out = torch.empty(batch, dtype=torch.float32, device=x0.device)
        _fold[(batch,)](parts, out, chunks, ENTRIES=power_of_2(chunks))
    return out

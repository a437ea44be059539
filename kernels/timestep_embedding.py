"""Sines and cosines of timesteps.

Quarter turns are taken out of the angle in three exact steps (Cody & Waite 1980), so that the sine and cosine of what
is left are short polynomials: the GPU's own are either too coarse, or keep a table in local memory for huge angles. Its
power of two is too coarse as well: an error of 2^-22 in a frequency is ten ulp of an angle of 500.
"""

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, on_device
from .launch import remembered

# pi / 2 in three parts; the first two are short, so that their products with up to 2^13 quarter turns are exact.
_FIRST, _SECOND, _THIRD = tl.constexpr(1.5703125), tl.constexpr(4.83751296997e-04), tl.constexpr(7.5494978e-08)


@triton.jit
def _sincos(angle):
    """(sine, cosine). The coefficients are minimax fits in turns."""
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - quarter * _FIRST) - quarter * _SECOND) - quarter * _THIRD
    r *= 0.15915494309189535
    z = r * r
    s = r * (((-75.3935628891 * z + 81.5923535569) * z - 41.3416614549) * z + 6.28318528683)
    c = (((59.2292441778 * z - 85.4432362966) * z + 64.9393218472) * z - 19.7392086816) * z + 1.0
    q = quarter - 4 * tl.floor(quarter * 0.25)  # 0 to 3
    odd = (q == 1) | (q == 3)
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where(q >= 2, -sine, sine), tl.where((q == 1) | (q == 2), -cosine, cosine)


@triton.jit
def _power_of_two(x):
    """2^x to an ulp: the whole part is an exponent's bits, the rest, up to one half, a series to the seventh term."""
    whole = tl.floor(x + 0.5)
    f = (x - whole) * 0.6931471805599453
    p = 1 + f * (1 + f * (1 / 2 + f * (1 / 6 + f * (1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (1 / 5040)))))))
    return p * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@remembered
@triton.jit
def _timestep_embedding(timestep, out, exponent, half, dim, sine_at, cosine_at, TILE: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    t = tl.load(timestep + sample).to(tl.float32)
    angle = t * _power_of_two(i.to(tl.float32) * tl.cast(exponent, tl.float32))
    sine, cosine = _sincos(angle)
    out += sample * dim
    tl.store(out + sine_at + i, sine, i < half)
    tl.store(out + cosine_at + i, cosine, i < half)
    if dim % 2 == 1:
        tl.store(out + 2 * half + i, tl.zeros([TILE], tl.float32), i == 0)


def timestep_embedding(
    timestep: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float
) -> Tensor:
    """float32 [B, dim]."""
    out = torch.empty(timestep.shape[0], dim, device=timestep.device, dtype=torch.float32)
    half = dim // 2
    if out.numel():
        sine_at, cosine_at = (half, 0) if flip_sin_to_cos else (0, half)
        exponent = -log2(max_period) / (half - freq_shift) if half > 1 else 0.0
        with on_device(timestep):
            _timestep_embedding[(timestep.shape[0], cdiv(max(half, 1), 128))](
                timestep, out, exponent, half, dim, sine_at, cosine_at, TILE=128, num_warps=1, enable_fp_fusion=True
            )
    return out

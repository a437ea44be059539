"""LayerNorm and its modulation, with or without a gated residual in front.

A program keeps whole rows of one sample in registers, several short ones or a long one: what is read once is summed,
centred, squared and written. How many rows that is depends on their length only, so that a sample's result does not
depend on its batch.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, grid, on_device, power_of_2, sample_index
from .launch import remembered

_TILE = 4096  # elements that a program keeps, or one row if that is longer


@functools.lru_cache(256)
def rows_of(channels: int) -> dict[str, Any]:
    """The compile-time shape of a program's tile of rows, and its warps."""
    columns = power_of_2(channels)
    rows = max(1, _TILE // columns)
    return {"ROWS": min(rows, 16), "COLUMNS": columns, "num_warps": min(16, max(4, columns * rows // 1024))}


@triton.jit
def _vector(ptr, sample, c, channels, inside):
    """A sample's row of [B, C], to be broadcast over tokens."""
    return tl.load(ptr + sample * channels + c, inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _norm(x, inside, c, sample, shift, scale, weight, bias, eps, channels):
    """(layer_norm(x) * weight + bias) * (1 + scale) + shift of rows; x is 0 outside."""
    n = tl.cast(channels, tl.float32)
    d = tl.where(inside, x - (tl.sum(x, axis=1) / n)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, axis=1) / n + tl.cast(eps, tl.float32))
    y = d * rstd[:, None]
    there = c < channels
    if weight is not None:
        y *= tl.load(weight + c, there, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + c, there, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        y = y * (1 + _vector(scale, sample, c, channels, there)) + _vector(shift, sample, c, channels, there)
    return y


@triton.jit
def _place(sample, tokens, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets, their mask, channels) of this program's rows."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)
    return (sample * tokens + t) * channels + c[None, :], (t < tokens) & (c < channels)[None, :], c


@remembered
@triton.jit(do_not_specialize=["batch", "tokens"])
def _layer_norm_modulate(
    x_ptr, shift, scale, weight, bias, y_ptr, eps, batch, tokens, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    sample = sample_index()
    if sample >= batch:
        return
    offset, inside, c = _place(sample, tokens, channels, ROWS, COLUMNS)
    x = tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32)
    y = _norm(x, inside, c, sample, shift, scale, weight, bias, eps, channels)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)


@remembered
@triton.jit(do_not_specialize=["batch", "tokens"])
def _gate_residual_norm_modulate(
    x_ptr, y_ptr, gate, shift, scale, weight, bias, r_ptr, normal_ptr, eps, batch, tokens, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = sample_index()
    if sample >= batch:
        return
    offset, inside, c = _place(sample, tokens, channels, ROWS, COLUMNS)
    x = tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offset, inside, other=0.0).to(tl.float32)
    r = x + _vector(gate, sample, c, channels, c < channels) * y
    tl.store(r_ptr + offset, r.to(r_ptr.dtype.element_ty), inside)
    normal = _norm(r, inside, c, sample, shift, scale, weight, bias, eps, channels)
    tl.store(normal_ptr + offset, normal.to(normal_ptr.dtype.element_ty), inside)


def layer_norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(layer_norm(x) * weight + bias) * (1 + scale) + shift; shift and scale both given or both None."""
    y = torch.empty_like(x)
    if x.numel():
        batch, tokens, channels = x.shape
        tile = rows_of(channels)
        with on_device(x):
            _layer_norm_modulate[grid(batch, cdiv(tokens, tile["ROWS"]))](
                x, shift, scale, weight, bias, y, eps, batch, tokens, channels, **tile, enable_fp_fusion=True
            )
    return y


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(r, layer_norm_modulate(r)) with r = x + gate * y."""
    r, normal = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        batch, tokens, channels = x.shape
        tile = rows_of(channels)
        with on_device(x):
            _gate_residual_norm_modulate[grid(batch, cdiv(tokens, tile["ROWS"]))](
                x, y, gate, shift, scale, weight, bias, r, normal, eps, batch, tokens, channels, **tile,
                enable_fp_fusion=True,
            )  # fmt: skip
    return r, normal

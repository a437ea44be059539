"""RMSNorm: a program keeps whole rows in registers, several short ones or a long one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, on_device
from .launch import remembered
from .layer_norm_modulate import rows_of


@remembered
@triton.jit
def _rms_norm(x_ptr, weight, y_ptr, eps, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)
    offset, inside = row * channels + c[None, :], (row < rows) & (c < channels)[None, :]
    x = tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1) / tl.cast(channels, tl.float32)
    y = x * tl.rsqrt(mean + tl.cast(eps, tl.float32))[:, None]
    if weight is not None:
        y *= tl.load(weight + c, c < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    y = torch.empty_like(x)
    if x.numel():
        channels = x.shape[-1]
        rows, tile = x.numel() // channels, rows_of(channels)
        with on_device(x):
            _rms_norm[(cdiv(rows, tile["ROWS"]),)](x, weight, y, eps, rows, channels, **tile, enable_fp_fusion=True)
    return y

"""Normal noise: four normals a counter, one 16-byte store for every four (float32) or eight (half) elements."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import NORMALS, cdiv, grid, normal_run, on_device, sample_index
from .launch import remembered

_TILE = 2048


@remembered
@triton.jit(do_not_specialize=["batch", "draw", "block"])
def _randn(out, keys, batch, n, draw, block, skew, TILE: tl.constexpr, FAST: tl.constexpr):
    """Element i of a sample is lane (i + skew) % 4 of counter block + (i + skew) // 4. A skew of 0 is known to be
    divisible by 16 when compiling, so that the usual call stores whole vectors."""
    sample = sample_index()
    if sample >= batch:
        return
    start = tl.program_id(0).to(tl.int64) * TILE
    counters = tl.cast(block + start // NORMALS, tl.uint32) + tl.arange(0, TILE // NORMALS).to(tl.uint32)
    z = tl.reshape(normal_run(keys, sample, draw, counters, FAST), [TILE])
    i = start + tl.arange(0, TILE) - skew
    tl.store(out + sample * n + i, z.to(out.dtype.element_ty), (i >= 0) & (i < n))


def randn(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> Tensor:
    """Noise [B, *shape] of dtype, from element `offset` of every sample's stream."""
    batch, n = keys.shape[0], prod(shape)
    out = torch.empty(batch, *shape, device=keys.device, dtype=dtype)
    if out.numel():
        block, skew = divmod(offset, NORMALS.value)
        with on_device(keys):
            chunks = cdiv(n + skew, _TILE)
            _randn[grid(batch, chunks)](
                out, keys, batch, n, draw, block, skew, TILE=_TILE, FAST=keys.is_cuda, enable_fp_fusion=True
            )
    return out

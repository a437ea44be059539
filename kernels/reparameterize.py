"""The reparameterisation trick in one pass: two reads, one write, the noise drawn in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import chunks_of, grid, on_device, sample_index, tile, tile_normals, tile_of
from .launch import remembered

_TILE = 2048


@remembered
@triton.jit(do_not_specialize=["batch", "draw"])
def _reparameterize(
    mean, logvar, keys, out, batch, n, draw, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    QUADS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    sample = sample_index()
    if sample >= batch:
        return
    offset, mask = tile(sample, n, CHANNELS, COLUMNS, ROWS)
    centre = tl.load(mean + offset, mask).to(tl.float32)
    spread = tl.exp(tl.load(logvar + offset, mask).to(tl.float32) * 0.5)
    z = tile_normals(keys, sample, draw, n, CHANNELS, COLUMNS, ROWS, QUADS, FAST)
    tl.store(out + offset, (centre + spread * z).to(out.dtype.element_ty), mask)


def reparameterize(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Tensor:
    """z = mean + exp(logvar / 2) epsilon."""
    out = torch.empty_like(mean)
    if mean.numel():
        batch, shape = mean.shape[0], tile_of(mean, _TILE)
        n = mean.numel() // batch
        with on_device(mean):
            _reparameterize[grid(batch, chunks_of(n, **shape))](
                mean, logvar, keys, out, batch, n, draw, FAST=mean.is_cuda, **shape, enable_fp_fusion=True
            )
    return out

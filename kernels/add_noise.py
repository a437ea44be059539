"""The forward process in one pass: timestep and schedule looked up by the program, noise drawn in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import chunks_of, grid, on_device, sample_index, tile, tile_normals, tile_of
from .launch import remembered

_TILE = 2048


@remembered
@triton.jit(do_not_specialize=["batch", "rows", "draw"])
def _add_noise(
    x0, timestep, alpha_sigma, keys, x_t, noise, batch, n, rows, draw, RETURN_NOISE: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    sample = sample_index()
    if sample >= batch:
        return
    row = tl.load(timestep + sample)
    there = (row >= 0) & (row < rows)  # else NaN: never outside the table
    alpha = tl.load(alpha_sigma + 2 * row, there, other=float("nan"))
    sigma = tl.load(alpha_sigma + 2 * row + 1, there, other=float("nan"))
    offset, mask = tile(sample, n, CHANNELS, COLUMNS, ROWS)
    x = tl.load(x0 + offset, mask).to(tl.float32)
    z = tile_normals(keys, sample, draw, n, CHANNELS, COLUMNS, ROWS, QUADS, FAST)
    tl.store(x_t + offset, (alpha * x + sigma * z).to(x_t.dtype.element_ty), mask)
    if RETURN_NOISE:
        tl.store(noise + offset, z.to(noise.dtype.element_ty), mask)


def add_noise(
    x0: Tensor, timestep: Tensor, alpha_sigma: Tensor, keys: Tensor, draw: int, return_noise: bool
) -> tuple[Tensor, Tensor]:
    """(x_t, epsilon); epsilon is empty unless return_noise."""
    x_t = torch.empty_like(x0)
    noise = torch.empty_like(x0) if return_noise else x0.new_empty(0)
    if x0.numel():
        batch, shape = x0.shape[0], tile_of(x0, _TILE)
        n = x0.numel() // batch
        with on_device(x0):
            _add_noise[grid(batch, chunks_of(n, **shape))](
                x0, timestep, alpha_sigma, keys, x_t, noise, batch, n, alpha_sigma.shape[0], draw,
                RETURN_NOISE=return_noise, FAST=x0.is_cuda, **shape, enable_fp_fusion=True,
            )  # fmt: skip
    return x_t, noise

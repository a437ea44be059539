"""One sampler step in one pass: table row, guidance, x0, clip, three weighted sums, noise and casts.

A program reads the row of its sample once. Optional inputs are compile-time flags: what a sampler does not use costs
nothing. The columns of a row are those of the op (diffkern/ops/sampler_step.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import chunks_of, grid, on_device, sample_index, tile, tile_normals, tile_of
from .launch import remembered

_TILE = 1024
_WIDTH = tl.constexpr(32)
_C_IN, _A, _B, _CLIP, _NOISE, _DRAW = (tl.constexpr(i) for i in range(1, 7))
_NEXT, _NEXT_BASE, _NEXT_H = tl.constexpr(8), tl.constexpr(16), tl.constexpr(24)


@triton.jit
def _combine(weights, there, x, m, x0, h0, h1, h2, base, PAST: tl.constexpr, BASE: tl.constexpr):
    """The weighted sum of the terms that are there, in the reference's order; NaN if the row is not there."""
    total = tl.load(weights, there, other=float("nan")) * x + tl.load(weights + 1) * m + tl.load(weights + 2) * x0
    if PAST & 1:
        total += tl.load(weights + 3) * h0
    if PAST & 2:
        total += tl.load(weights + 4) * h1
    if PAST & 4:
        total += tl.load(weights + 5) * h2
    if BASE:
        total += tl.load(weights + 6) * base
    return total


@remembered
@triton.jit(do_not_specialize=["batch", "rows"])
def _sampler_step(
    x_ptr, output_ptr, table, row_ptr, keys, guidance, base_ptr, h0_ptr, h1_ptr, h2_ptr,
    x_next_ptr, input_ptr, base_next_ptr, h_next_ptr, batch, n, rows,
    NOISY: tl.constexpr, GUIDED: tl.constexpr, BASE: tl.constexpr, PAST: tl.constexpr,
    RESULTS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    sample = sample_index()
    if sample >= batch:
        return
    offset, mask = tile(sample, n, CHANNELS, COLUMNS, ROWS)
    conditional = offset + batch.to(tl.int64) * n  # the second half of a guided batch
    x = tl.load(x_ptr + offset, mask).to(tl.float32)
    m = tl.load(output_ptr + offset, mask).to(tl.float32)
    if GUIDED:
        scale = tl.load(guidance + sample).to(tl.float32)
        m += scale * (tl.load(output_ptr + conditional, mask).to(tl.float32) - m)
    base = tl.load(base_ptr + offset, mask).to(tl.float32) if BASE else x
    h0 = tl.load(h0_ptr + offset, mask).to(tl.float32) if PAST & 1 else x
    h1 = tl.load(h1_ptr + offset, mask).to(tl.float32) if PAST & 2 else x
    h2 = tl.load(h2_ptr + offset, mask).to(tl.float32) if PAST & 4 else x

    # The last row only ends the table (its c_in is what the model would see next), so no sample is at it.
    row = tl.load(row_ptr + sample)
    there = (row >= 0) & (row < rows - 1)
    r = table + tl.where(there, row, 0) * _WIDTH  # never outside the table
    clip = tl.load(r + _CLIP)
    x0 = tl.load(r + _A) * x + tl.load(r + _B) * m
    x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    x_next = _combine(r + _NEXT, there, x, m, x0, h0, h1, h2, base, PAST, BASE)
    if NOISY:
        draw = tl.load(r + _DRAW).to(tl.int64)
        z = tile_normals(keys, sample, draw, n, CHANNELS, COLUMNS, ROWS, QUADS, FAST)
        x_next += tl.load(r + _NOISE) * z
    if RESULTS & 1:  # the flags of the op
        tl.store(x_next_ptr + offset, x_next.to(x_next_ptr.dtype.element_ty), mask)
    if RESULTS & 2:
        model_input = (tl.load(r + _WIDTH + _C_IN) * x_next).to(input_ptr.dtype.element_ty)
        tl.store(input_ptr + offset, model_input, mask)
        if GUIDED:
            tl.store(input_ptr + conditional, model_input, mask)
    if RESULTS & 4:
        base_next = _combine(r + _NEXT_BASE, there, x, m, x0, h0, h1, h2, base, PAST, BASE)
        tl.store(base_next_ptr + offset, base_next.to(base_next_ptr.dtype.element_ty), mask)
    if RESULTS & 8:
        h_next = _combine(r + _NEXT_H, there, x, m, x0, h0, h1, h2, base, PAST, BASE)
        tl.store(h_next_ptr + offset, h_next.to(h_next_ptr.dtype.element_ty), mask)


def sampler_step(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, keys: Tensor | None, guidance: Tensor | None,
    base: Tensor | None, h0: Tensor | None, h1: Tensor | None, h2: Tensor | None, results: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(x_next, model_input, base_next, h_next)."""
    if results is None:
        results = 3 | (0 if base is None else 4) | (0 if h0 is None else 8)
    likes = enumerate((x, model_output, x, x))
    made = [torch.empty_like(like) if results & 1 << i else like.new_empty(0) for i, like in likes]
    x_next, model_input, base_next, h_next = made
    if x.numel():
        batch, shape = x.shape[0], tile_of(x, _TILE, by_counter=keys is not None)
        n = x.numel() // batch
        past = sum(1 << i for i, h in enumerate((h0, h1, h2)) if h is not None)
        with on_device(x):
            _sampler_step[grid(batch, chunks_of(n, **shape))](
                x, model_output, table, row, keys, guidance, base, h0, h1, h2,
                x_next, model_input, base_next, h_next, batch, n, table.shape[0],
                NOISY=keys is not None, GUIDED=guidance is not None, BASE=base is not None, PAST=past,
                RESULTS=results, FAST=x.is_cuda, **shape, enable_fp_fusion=True,
            )  # fmt: skip
    return x_next, model_input, base_next, h_next

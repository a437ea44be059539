"""One step of any sampler: a row of a table (see diffkern/samplers/table.py), applied in one pass.

Every ODE and SDE sampler in use is, per model call, a linear map with coefficients known before sampling starts. From

    terms = (x, m, x0, h0, h1, h2, base)        m: the guided model output,  x0 = clip(a x + b m)

a row makes the next sample, the next `base` (the point that a corrector or Heun pair starts from) and the next history
entry, each a weighted sum of the terms; the caller then shifts the history: h0, h1, h2 = h_next, h0, h1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.op import Cost, Sample, op
from diffkern.ops.layout import memory_format, per_sample
from diffkern.ops.randn import normal

TERMS = ("x", "m", "x0", "h0", "h1", "h2", "base")
# The columns of a row. Each weight block has a place for every term and one of padding: a row is one 128-byte line.
TIMESTEP, C_IN, A, B, CLIP, NOISE, DRAW = range(7)
NEXT, NEXT_BASE, NEXT_H = 8, 16, 24
WIDTH = 32


@op
def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    keys: Tensor | None = None,
    guidance: Tensor | None = None,
    base: Tensor | None = None,
    h0: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Guidance, prediction -> x0, clipping, linear combination, fresh noise and casts, with per-sample rows.

    x, base, h0, h1, h2: [B, ...] float32; the optional ones are given if the table uses them. model_output: [B, ...],
    or with guidance [2B, ...], unconditional half first. table: float32 [R + 1, 32]. row: int64 [B], below R.
    keys: int64 [B, 2], given if the table draws noise. guidance: float32 [B], classifier-free guidance scale
    (Ho & Salimans 2022): m = m_u + g (m_c - m_u).
    Returns (x_next, model_input, base_next, h_next) in the layout of x. model_input is c_in of the next row times
    x_next, in the dtype and batch size of model_output: ready for the next model call. base_next and h_next are empty
    unless base and h0 are given."""
    r = table[row].to(x.dtype)
    c_in = table[row + 1, C_IN].to(x.dtype)
    m = model_output.to(x.dtype)
    if guidance is not None:
        m_u, m_c = m.chunk(2)
        m = m_u + per_sample(guidance.to(x.dtype), x) * (m_c - m_u)
    clip = per_sample(r[:, CLIP], x)
    x0 = per_sample(r[:, A], x) * x + per_sample(r[:, B], x) * m
    x0 = torch.maximum(torch.minimum(x0, clip), -clip)
    terms = (x, m, x0, h0, h1, h2, base)

    def combine(block: int) -> Tensor:
        total = torch.zeros_like(x)
        for j, term in enumerate(terms):
            if term is not None:
                total = total + per_sample(r[:, block + j], x) * term
        return total.contiguous(memory_format=memory_format(x))

    x_next = combine(NEXT)
    if keys is not None:
        noise = normal(keys, x.shape[1:], r[:, DRAW].to(torch.int64), x.dtype)
        x_next = (x_next + per_sample(r[:, NOISE], x) * noise).contiguous(memory_format=memory_format(x))
    model_input = (per_sample(c_in, x) * x_next).to(model_output.dtype)
    if guidance is not None:
        model_input = torch.cat([model_input, model_input])
    empty = x.new_empty(0)
    return (
        x_next,
        model_input.contiguous(memory_format=memory_format(x)),
        combine(NEXT_BASE) if base is not None else empty,
        combine(NEXT_H) if h0 is not None else empty,
    )

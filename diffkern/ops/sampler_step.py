"""One step of any sampler: a row of a table (see diffkern/samplers/table.py), applied in one pass.

Every ODE and SDE sampler in use is, per model call, a linear map with coefficients known before sampling starts. From

    terms = (x, m, x0, h0, h1, h2, base)        m: the guided model output,  x0 = clip(a x + b m)

a row makes the next sample, the next `base` (the point that a corrector or Heun pair starts from) and the next history
entry, each a weighted sum of the terms; the caller then shifts the history: h0, h1, h2 = h_next, h0, h1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffkern.check import alike, batched, integers, refuse, rows_known, shaped, unfit
from diffkern.layout import accumulate, fast_dtype, memory_format, per_sample, rows_of
from diffkern.op import Cost, Sample, for_gpu, op
from diffkern.ops.randn import noise_keys, normal

TERMS = ("x", "m", "x0", "h0", "h1", "h2", "base")
# The columns of a row. Each weight block has a place for every term and one of padding: a row is one 128-byte line.
TIMESTEP, C_IN, A, B, CLIP, NOISE, DRAW = range(7)
NEXT, NEXT_BASE, NEXT_H = 8, 16, 24
WIDTH = 32
# The results, as flags of `results`.
MAKES_NEXT, MAKES_INPUT, MAKES_BASE, MAKES_HISTORY = 1, 2, 4, 8


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
    results: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Guidance, prediction -> x0, clipping, linear combination, fresh noise and casts, with per-sample rows.

    x, base, h0, h1, h2, the state: [B, ...], float32 or all in model_output's dtype; the optional ones are given if the
    table uses them. model_output: [B, ...], or with guidance [2B, ...], unconditional half first. table: float32
    [R + 1, 32]. row: int64 [B], below R. keys: int64 [B, 2], given if the table draws noise. guidance: float32 [B],
    classifier-free guidance scale (Ho & Salimans 2022): m = m_u + g (m_c - m_u). results: which are made, the sum of
    some of MAKES_NEXT, MAKES_INPUT, MAKES_BASE, MAKES_HISTORY; by default the first two, and the others if base and h0
    are given.
    Returns (x_next, model_input, base_next, h_next) in the layout of x; what is not made has no elements. model_input
    is c_in of the next row times x_next, in the dtype and batch size of model_output: ready for the next model call.
    The others have the dtype of x. Sums are made in float32 whatever the dtypes. Raises RuntimeError for a row on the
    CPU that is not below R; on a GPU, where only the device knows it, all results of that sample are NaN."""
    if results is None:
        results = _by_default(base, h0)
    state, acc = x.dtype, accumulate(x.dtype)
    x, m, r = x.to(acc), model_output.to(acc), rows_of(table[:-1], row).to(acc)
    c_in = rows_of(table[1:], row)[:, C_IN].to(acc)
    if guidance is not None:
        m_u, m_c = m.chunk(2)
        m = m_u + per_sample(guidance.to(acc), x) * (m_c - m_u)
    clip = per_sample(r[:, CLIP], x)
    x0 = per_sample(r[:, A], x) * x + per_sample(r[:, B], x) * m
    x0 = torch.maximum(torch.minimum(x0, clip), -clip)
    terms = (x, m, x0, h0, h1, h2, base)

    def combine(block: int) -> Tensor:
        total = torch.zeros_like(x)
        for j, term in enumerate(terms):
            if term is not None:
                total = total + per_sample(r[:, block + j], x) * term
        return total

    def made(result: Tensor | None, dtype: torch.dtype) -> Tensor:
        if result is None:
            return x.new_empty(0, dtype=dtype)
        return result.to(dtype).contiguous(memory_format=memory_format(x))

    x_next = combine(NEXT)
    if keys is not None:
        x_next = x_next + per_sample(r[:, NOISE], x) * normal(keys, x.shape[1:], r[:, DRAW].to(torch.int64), acc)
    model_input = per_sample(c_in, x) * x_next
    if guidance is not None:
        model_input = torch.cat([model_input, model_input])
    return (
        made(x_next if results & MAKES_NEXT else None, state),
        made(model_input if results & MAKES_INPUT else None, model_output.dtype),
        made(combine(NEXT_BASE) if results & MAKES_BASE else None, state),
        made(combine(NEXT_H) if results & MAKES_HISTORY else None, state),
    )


def _by_default(base: Tensor | None, h0: Tensor | None) -> int:
    """The results that are made where `results` does not say."""
    return MAKES_NEXT | MAKES_INPUT | (0 if base is None else MAKES_BASE) | (0 if h0 is None else MAKES_HISTORY)


@sampler_step.checks
def _(x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, keys: Tensor | None, guidance: Tensor | None,
      base: Tensor | None, h0: Tensor | None, h1: Tensor | None, h2: Tensor | None,
      results: int | None) -> None:  # fmt: skip
    batch = batched("sampler_step", "x", x)
    if table.dim() != 2 or table.shape[1] != WIDTH or len(table) < 2:
        unfit("sampler_step", "table", f"[R + 1, {WIDTH}] with a row and the one after it", table.shape)
    integers("sampler_step", "row", row, batch)
    rows_known("sampler_step", "row", row, len(table) - 1)
    integers("sampler_step", "keys", keys, batch, 2)
    shaped("sampler_step", "guidance", guidance, batch)
    for name, t in (("h0", h0), ("h1", h1), ("h2", h2), ("base", base)):
        if t is None:
            continue
        alike("sampler_step", name, t, x, batch)
        if t.dtype != x.dtype:
            refuse("sampler_step", f"{name} has the wrong dtype")
    alike("sampler_step", "model_output", model_output, x, batch if guidance is None else 2 * batch)


def _supports(x: Tensor, model_output: Tensor, table: Tensor, *_: object) -> bool | str:
    if x.dtype not in (torch.float32, model_output.dtype) or table.dtype != torch.float32:
        return "takes a float32 table, and a state in float32 or in the model's dtype"
    return fast_dtype(model_output.dtype)


@sampler_step.backend("cuda", devices=("cuda",), supports=_supports)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.diffkern_CUDA.sampler_step.default(*args)


@sampler_step.backend("triton", devices=("cuda",), supports=_supports)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from diffkern.kernels.sampler_step import sampler_step as kernel

    return kernel(*args)


@sampler_step.backend("cpu", devices=("cpu",), supports=_supports)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.diffkern_C.sampler_step.default(*args)  # the overload by name: not looked for in every call


@sampler_step.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import SHAPES, make

    acc = accumulate(dtype)  # the state is float32 whatever the model's dtype

    def sample(
        name: str, shape: tuple[int, ...], layout: str = "contiguous", noisy: bool = True, guided: bool = True,
        base: bool = True, history: tuple[int, ...] = (0, 1, 2), narrow: bool = False, results: int | None = None,
        workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            batch = shape[0]
            table = make((6, WIDTH), device, acc, seed=9)
            table[:, CLIP] = torch.tensor([0.3, 1.0, torch.inf, 2.0, 0.5, 0.0])
            table[:, DRAW] = torch.arange(6)
            state = [make(shape, device, dtype if narrow else acc, layout, seed) for seed in range(5)]
            output = make(((2 if guided else 1) * batch, *shape[1:]), device, dtype, layout, 5)
            row = torch.arange(batch, device=device) * 2 % 5
            keys = noise_keys(11, batch, device) if noisy else None
            guidance = torch.linspace(0.5, 7.5, batch, device=device, dtype=acc) if guided else None
            past = [h if i in history else None for i, h in enumerate(state[2:])]
            return state[0], output, table, row, keys, guidance, state[1] if base else None, *past, results

        return Sample(name, args, workload)

    for name, shape, layout in SHAPES:
        yield sample(name, shape, layout)
    yield sample("bare", (3, 3, 5, 5), noisy=False, guided=False, base=False, history=())
    yield sample("DPM-Solver++ 2M", (3, 3, 5, 5), "channels_last", noisy=False, base=False, history=(0,))
    yield sample("noise of one's own for h2", (2, 3, 5, 5), noisy=False, guided=False, base=False, history=(2,))
    yield sample("state in the model's dtype", (3, 3, 5, 5), narrow=True)
    yield sample("state in the model's dtype, channels_last", (5, 3, 7, 5), "channels_last", narrow=True)
    for flag in (MAKES_NEXT, MAKES_INPUT, MAKES_BASE, MAKES_HISTORY):
        yield sample(f"result {flag} alone", (3, 3, 5, 5), history=(), base=False, results=flag)
        yield sample(f"all but result {flag}", (3, 3, 5, 5), narrow=True, results=15 - flag)
    yield sample("SD 1.5, DDIM", (8, 4, 64, 64), noisy=False, base=False, history=(), workload=True)
    yield sample("SDXL, DPM-Solver++ 2M SDE", (8, 4, 128, 128), base=False, history=(0,), workload=True)
    yield sample("emoji, DPM-Solver++ 2M", (36, 3, 32, 32), noisy=False, base=False, history=(0,), workload=True)
    for name, noisy, past in (("DDIM", False, ()), ("DPM-Solver++ 2M SDE", True, (0,))):
        yield for_gpu(sample(f"SDXL, 128 samples, {name}", (128, 4, 128, 128), noisy=noisy, base=False, history=past))


@sampler_step.cost
def _(x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, keys: Tensor | None, guidance: Tensor | None,
      base: Tensor | None, h0: Tensor | None, h1: Tensor | None, h2: Tensor | None,
      results: int | None) -> Cost:  # fmt: skip
    if results is None:
        results = _by_default(base, h0)
    past = sum(t is not None for t in (base, h0, h1, h2))
    made = [bool(results & flag) for flag in (MAKES_NEXT, MAKES_BASE, MAKES_HISTORY)]
    outputs = 1 + bool(results & MAKES_INPUT)
    flops = (2 * (2 + past) * sum(made) + 8 + (26 if keys is not None else 0)) * x.numel()
    bytes = (1 + past + sum(made)) * x.numel() * x.element_size()
    return Cost(bytes + outputs * model_output.numel() * model_output.element_size(), flops)

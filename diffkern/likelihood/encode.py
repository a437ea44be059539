"""A sample as its noise, and back: the probability-flow ODE in both directions (Song et al. 2021, section 4.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern.likelihood.denoiser import Denoiser
from diffkern.likelihood.divergence import flow_field
from diffkern.likelihood.inputs import labels_of, positive, samples_of
from diffkern.likelihood.integrate import Solver, solve
from diffkern.likelihood.path import Path, in_batches
from diffkern.schedules import Schedule


def encode(
    model: Any,
    x: Tensor,
    schedule: Schedule | None = None,
    *,
    labels: Any = None,
    solver: str = "dopri5",
    steps: int = 20,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Tensor:
    """The noise that the probability-flow ODE makes of each sample: standard normal if the model is right, and all that
    there is to know of x: `decode` gives it back.

    x: [n, ...]. The other arguments are those of `ode_log_likelihood`. Returns [n, ...] on the CPU: float32 from a
    network, float64 from a float64 one or of float64 x for a callable."""
    return _carry(model, x, schedule, labels, Solver(solver, steps, rtol, atol), batch_size, progress, True)


def decode(
    model: Any,
    z: Tensor,
    schedule: Schedule | None = None,
    *,
    labels: Any = None,
    solver: str = "dopri5",
    steps: int = 20,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Tensor:
    """The sample that a noise is of: the inverse of `encode`, and of standard normal z [n, ...] a sampler. Arguments
    and result are those of `encode`."""
    return _carry(model, z, schedule, labels, Solver(solver, steps, rtol, atol), batch_size, progress, False)


def round_trip_error(model: Any, x: Tensor, schedule: Schedule | None = None, **options: Any) -> Tensor:
    """The largest difference in each sample between x and decode(encode(x)): float64 [n]. options: those of `encode`.
    What the solver gets wrong: the ODE itself loses nothing."""
    there = encode(model, x, schedule, **options)
    back = decode(model, there, schedule, **options)
    return (back.to(torch.float64) - x.cpu()).flatten(1).abs().amax(1)


@torch.no_grad()
def _carry(
    model: Any, x: Tensor, schedule: Schedule | None, labels: Any, solver: Solver, batch_size: int,
    progress: bool | None, to_noise: bool,
) -> Tensor:  # fmt: skip
    """encode, or decode."""
    denoiser = Denoiser.of(model, schedule)
    x = samples_of(x, "x" if to_noise else "z")
    positive(batch_size=batch_size)
    path = Path.of(denoiser, solver)
    classes = labels_of(denoiser, labels, len(x))
    out = torch.empty(x.shape, dtype=path.dtype(x))
    start, end = math.cos(path.first), 1 / path.scale
    grid = path.grid if to_noise else path.grid[::-1]
    before, after = (start, end) if to_noise else (1 / end, 1 / start)
    with in_batches(len(x), batch_size, progress, "encode" if to_noise else "decode") as parts:
        for part, done in parts:
            field = flow_field(denoiser, None if classes is None else classes[part])
            y = before * x[part].to(denoiser.device, out.dtype)
            out[part] = (after * solve(field, y, grid, solver, done).y).cpu()
    return out

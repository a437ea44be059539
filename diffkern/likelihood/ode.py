"""log p(x) along the probability-flow ODE (Song et al. 2021, section 4.3).

A diffusion model's ODE turns data into noise without any of its own. With y = x_t / r and the angle of `Denoiser` as
time, dy/d(angle) = v(y, angle), and log p changes by -div v (Chen et al. 2018, theorem 1; Grathwohl et al. 2019):

    log p(x) = log N(z; 0, I) - D log s + integral of div v over the angles + D log cos(first angle)

where z = y / s at the schedule's last timestep is taken to be standard normal, as a sampler takes it: s = 1, or
sin(last angle) for a variance-exploding schedule, whose samples start from sigma_T. The data is x = x_t / alpha_t at
the schedule's first timestep: the density is that of x_0 + (sigma_0 / alpha_0) epsilon, with the least noise that the
model knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diffkern.likelihood.denoiser import Denoiser
from diffkern.likelihood.dequantize import DEQUANTIZATIONS, dequantize
from diffkern.likelihood.divergence import (
    DIVERGENCES,
    LARGEST_EXACT,
    PROBES,
    difference_field,
    frozen,
    likelihood_field,
    probes_of,
)
from diffkern.likelihood.inputs import ids_of, labels_of, positive, samples_of
from diffkern.likelihood.integrate import Solver, solve
from diffkern.likelihood.path import Path, in_batches
from diffkern.likelihood.result import Likelihood
from diffkern.ops.randn import noise_keys
from diffkern.schedules import Schedule, one_of


@torch.no_grad()
def ode_log_likelihood(
    model: Any,
    x: Tensor,
    schedule: Schedule | None = None,
    *,
    labels: Any = None,
    divergence: str = "hutchinson",
    probe: str = "rademacher",
    probes: int = 1,
    solver: str = "dopri5",
    steps: int = 20,
    rtol: float | None = None,
    atol: float | None = None,
    dequantization: str | None = None,
    repeats: int = 1,
    seed: int = 0,
    sample_ids: Iterable[int] | None = None,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Likelihood:
    """log p(x) of each sample under the probability-flow ODE of a diffusion model, in nats.

    model: a Denoiser, a `Diffusion`, or a callable with its schedule; for the divergence autograd must be able to
    follow it. x: [n, ...], continuous data, or with dequantization 8-bit images on [-1, 1], of which log_p is then a
    lower bound on the log-probability, in expectation. labels: one or n classes, by default the null label of a
    class-conditional model.

    divergence: "exact", with D backward passes per model call; "hutchinson", unbiased, with one for each of `probes`
    probes, "rademacher" (+-1) or "gaussian" (Hutchinson 1990); or "difference", the same by two forward passes per
    probe, faster and in less memory, of any model. solver: "dopri5" chooses the steps of each sample for itself, to
    errors of atol + rtol |y|, by default 1e-3, or 1e-6 with the exact divergence, where no other error hides them;
    "rk4" and "heun" take `steps` steps, whose angles grow by one factor.

    dequantization: "uniform" or "variational", see `dequantize`. repeats: how often all is done again with other probes
    and other noise in the bins. The error bar is that of these repeats, else of the probes; with one of each it is
    unknown, NaN, unless nothing was drawn. seed, sample_ids: of the probes and the noise; the ids default to 0..n-1.
    batch_size: paths that are followed at once. progress: as for `diffkern.sample`.

    A sample's figure depends on its id, not on its batch: bit for bit under `batch_invariant` with "difference".
    The terms are "prior", "divergence" (with the change of scale) and "dequantization". A network computes in float32,
    log p adds up in float64. Raises ValueError for arguments that do not fit together and NotSolved, an
    ArithmeticError, where the solver does not get to the end."""
    denoiser = Denoiser.of(model, schedule)
    x = samples_of(x)
    one_of("divergence", divergence, DIVERGENCES)
    one_of("probe", probe, PROBES)
    positive(probes=probes, repeats=repeats, batch_size=batch_size)
    tolerance = 1e-6 if divergence == "exact" else 1e-3
    rtol, atol = (tolerance if given is None else given for given in (rtol, atol))
    path = Path.of(denoiser, Solver(solver, steps, rtol, atol))
    shape = tuple(x.shape[1:])
    dims = math.prod(shape)
    if divergence == "exact" and dims > LARGEST_EXACT:
        raise ValueError(
            f"the exact divergence takes a backward pass per dimension, and is for at most {LARGEST_EXACT} of them, "
            f"not {dims}: take divergence='hutchinson'"
        )
    if dequantization is not None:
        one_of("dequantization", dequantization, DEQUANTIZATIONS)
        if len(x) and x.abs().max() > 1:
            raise ValueError(
                f"dequantization is for 8-bit images on [-1, 1], but x runs from {x.min():g} to {x.max():g}"
            )
    n = len(x)
    classes, ids = labels_of(denoiser, labels, n), ids_of(sample_ids, n)

    # A repeat is another path of the same sample: all paths are followed in batches.
    terms = torch.zeros(3, n * repeats, dtype=torch.float64)
    each_probe = torch.zeros(n * repeats, 1 if divergence == "exact" else probes, dtype=torch.float64)
    with frozen(denoiser.model), in_batches(n * repeats, batch_size, progress, "ode") as parts:
        for part, done in parts:
            which, repeat = part // repeats, (part % repeats).to(denoiser.device)
            keys = noise_keys(seed, ids[which], denoiser.device)
            data, log_q = x[which].to(denoiser.device), torch.zeros(len(part), dtype=torch.float64)
            if dequantization is not None:
                data, log_q = dequantize(dequantization, data, math.tan(path.first), keys, repeat)
            given = None if classes is None else classes[which]
            if divergence == "exact":
                field = likelihood_field(denoiser, given, None)
            else:
                drawn = probes_of(probe, keys, shape, repeat * probes, probes, path.dtype(x))
                field = (difference_field if divergence == "difference" else likelihood_field)(denoiser, given, drawn)
            y = (math.cos(path.first) * data).to(path.dtype(x))
            solution = solve(field, y, path.grid, path.solver, done)
            terms[0, part] = path.prior(solution.y).cpu()
            each_probe[part] = -(solution.integrals + dims * math.log(math.cos(path.first))).cpu()
            terms[1, part] = each_probe[part].mean(1)
            terms[2, part] = log_q.cpu()

    terms = terms.reshape(3, n, repeats)
    names = ("prior", "divergence", "dequantization")[: 2 if dequantization is None else 3]
    errors = torch.full((4, n), math.nan, dtype=torch.float64)  # of the terms, and of their sum
    if repeats > 1 and (divergence != "exact" or dequantization is not None):
        errors = torch.cat([terms, terms.sum(0)[None]]).std(2) / repeats**0.5
    elif dequantization is None and (divergence == "exact" or probes > 1):  # the path is the same for every probe
        errors.zero_()
        if divergence != "exact":
            errors[1] = errors[3] = each_probe.std(1) / probes**0.5
    named, of_named = dict(zip(names, terms.mean(2), strict=False)), dict(zip(names, errors, strict=False))
    return Likelihood(-terms.sum(0).mean(1), errors[3], dims, "ode", named, of_named)

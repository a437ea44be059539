"""The variational bound of a diffusion model as it samples: a KL for every step of the chain (Ho et al. 2020, eq. 5;
with learned variances Nichol & Dhariwal 2021).

    -log p(x_0) <= KL(q(x_{T-1} | x_0) || N(0, v))                                         prior
                 + sum_{t=1}^{T-1} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))         transitions
                 + E -log p(x_0 | x_0's first noising)                                     decoder
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffkern.likelihood.denoiser import Denoiser
from diffkern.likelihood.inputs import positive
from diffkern.likelihood.pairs import Pairs, neighbour_variance
from diffkern.likelihood.result import Likelihood
from diffkern.ops.vlb_term import BIN, C1, CLIP, K0, LOGVAR_MAX, LOGVAR_MIN, VAR, WIDTH, A, B
from diffkern.samplers.ddpm import posterior, step_variance
from diffkern.samplers.grid import DATA, Point, bound
from diffkern.schedules import Schedule, one_of

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
DECODERS = ("discretized", "gaussian")


def vlb_table(
    schedule: Schedule, variance: str = "fixed_small", decoder: str = "discretized", clip: float | None = None
) -> Tensor:
    """The rows of `vlb_term`: 0 is the decoder's, t the KL of the step from t to t - 1. float64 [T, 16].

    A KL is in units of the true posterior's standard deviation, so that the terms that cancel are exact in float32 too:
    with C1 = alpha_s beta / sigma_t^2 / std = sqrt(SNR_s - SNR_t) (Kingma et al. 2021, eq. 14) its variance is 1.
    variance: that of the posterior, the larger beta_t (Ho et al. 2020, section 3.2), or between the two as the model
    says (Nichol & Dhariwal 2021, eq. 15). At t = 0, where the posterior has none, the smaller is that at t = 1, as in
    both papers' code, and the larger beta_0 = sigma_0^2. The former is far too small where many steps crowd at the
    first noise level, as EDM's do. clip: the bound on |x_0|, None for the schedule's. Raises ValueError."""
    one_of("variance", variance, VARIANCES)
    one_of("decoder", decoder, DECODERS)
    if len(schedule) < 2:
        raise ValueError(f"a likelihood needs a schedule of at least 2 timesteps, not {len(schedule)}")
    table = torch.zeros(len(schedule), WIDTH, dtype=torch.float64)
    points = [Point(0.0, a, s) for a, s in zip(schedule.alpha_t.tolist(), schedule.sigma_t.tolist(), strict=True)]
    for t, p in enumerate(points):
        table[t, A], table[t, B] = schedule.x0_weights(p.alpha, p.sigma)
    if not table.isfinite().all():
        raise ValueError(
            "with this schedule the prediction type cannot give x0 at the last timestep (a zero-terminal-SNR schedule "
            "needs v or x0 prediction)"
        )
    table[:, CLIP] = bound(schedule, clip)
    first = posterior(points[1], points[0])[1]
    for t, (s, p) in enumerate(pairwise([DATA, *points])):
        mean, true = posterior(p, s)
        unit = true or 1.0  # the decoder's are as they are
        smaller, larger = math.log((true or first) / unit), math.log(step_variance(p, s) / unit)
        table[t, C1], table[t, K0], table[t, VAR] = mean["x0"] / unit**0.5, -1.0, 1.0
        table[t, LOGVAR_MIN] = larger if variance == "fixed_large" else smaller
        table[t, LOGVAR_MAX] = smaller if variance == "fixed_small" else larger
    table[0, K0], table[0, VAR] = math.log(2 * math.pi), 0.0
    table[0, BIN] = 1 / 255 if decoder == "discretized" else 0.0
    return table


def shares(schedule: Schedule) -> Tensor:
    """What share of the transitions of N(0, 1) data that of each t = 1 to T - 1 has, (SNR_s - SNR_t) / (1 + SNR_t) of
    their sum: those of other data are smooth beside it. float64 [T - 1]."""
    snr = (schedule.alpha_t / schedule.sigma_t) ** 2
    size = (snr[:-1] - snr[1:]) / (1 + snr[1:])
    return size / size.sum()


@torch.no_grad()
def vlb(
    model: Any,
    x: Tensor,
    schedule: Schedule | None = None,
    *,
    labels: Any = None,
    terms: int | None = None,
    variance: str = "fixed_small",
    decoder: str = "discretized",
    clip: float | None = None,
    draws: int = 1,
    seed: int = 0,
    sample_ids: Iterable[int] | None = None,
    batch_size: int = 128,
    progress: bool | None = None,
) -> Likelihood:
    """The discrete-time variational bound: log_p is at most log p(x) of the model that DDPM samples from, in all of the
    schedule's steps, but for the Monte-Carlo noise.

    model: a Denoiser, a Diffusion, or a callable with its schedule. x: float [n, ...]. decoder: "discretized" for
    pixels of 8 bits on [-1, 1], of which log_p is the probability (Ho et al. 2020, eq. 13), or "gaussian" for
    continuous data, a density. variance, clip: see `vlb_table`; clip bounds |x_0| as the samplers do. labels: None, one
    or n; None is the null label of a class-conditional model.

    terms: None sums over every t. K takes K random timesteps a sample instead, for an unbiased estimate: one in each of
    K strata, drawn and weighted by how large the terms of N(0, 1) data are, which makes a few dozen do. draws: how
    often all of that is repeated, with other noise. seed, sample_ids: the figure of sample i of a seed is the same
    alone and in any batch; ids default to 0..n-1. batch_size: pairs (x_t, t), of any samples and timesteps, in a model
    call. progress: as in `diffkern.sample`.

    stderr: of the noise of x_t and of the timesteps. The decoder is drawn twice at least, and is judged by the spread.
    So are the transitions of a full sum with draws >= 2; otherwise each is judged by its neighbours in t, as a point of
    a smooth curve, to about a tenth (NaN for fewer than 3 transitions).

    terms of the result: "prior" [n], "decoder" [n], and "transitions" [n, T - 1], column j that of t = j + 1, or with
    `terms` [n, K], that of each stratum, both from data to noise.
    Raises ValueError for arguments that are not these, with a sentence that says what is allowed."""
    denoiser = Denoiser.of(model, schedule)
    table = vlb_table(denoiser.schedule, variance, decoder, clip)
    T = len(denoiser.schedule)
    if terms is not None and not 3 <= terms < T:
        raise ValueError(f"terms must be None, for all, or from 3 to {T - 1}, the number of transitions, not {terms}")
    positive(draws=draws)
    pairs = Pairs.of(denoiser, x, labels, seed, sample_ids, batch_size, progress, levels=decoder == "discretized")
    n, count, repeats = len(pairs.x), terms or T - 1, max(2, draws)  # repeats: of the decoder
    share = shares(denoiser.schedule)
    if terms is None:
        t, weight = torch.arange(T - 1).repeat(n, draws), share.repeat(draws)
    else:
        u = torch.stack([pairs.uniforms(terms, r) for r in range(draws)], 1)
        u = (torch.arange(terms) + u).flatten(1) / terms
        t = torch.searchsorted(share.cumsum(0), u).clamp(max=T - 2)
        weight = terms * share[t]
    rows = torch.cat([torch.zeros(n, repeats, dtype=torch.int64), t + 1], 1)
    each = pairs.terms(denoiser.at(torch.arange(T)), table, rows, variance == "learned_range", "vlb")

    first, steps = each[:, :repeats], each[:, repeats:]
    smooth = (steps / weight).reshape(n, draws, count)
    if terms is None:
        steps = steps.reshape(n, draws, count)
        of_steps = steps.var(1) if draws > 1 else share**2 * neighbour_variance(smooth[:, 0])
        steps = steps.mean(1)
    else:
        of_steps = neighbour_variance(smooth.flatten(0, 1)).reshape(n, draws, count).mean(1)
        steps = smooth.mean(1)
    prior, decoder_terms, of_decoder = pairs.prior(), first.mean(1), first.var(1) / repeats
    found = {"prior": prior, "transitions": steps, "decoder": decoder_terms}
    errors = {"prior": torch.zeros_like(prior), "transitions": of_steps / draws, "decoder": of_decoder}
    errors = {name: variance.sqrt() for name, variance in errors.items()}
    stderr = (of_decoder + of_steps.sum(1) / draws).sqrt()
    return Likelihood(-(prior + steps.sum(1) + decoder_terms), stderr, pairs.dims, "vlb", found, errors)

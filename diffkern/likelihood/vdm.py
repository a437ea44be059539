"""The variational bound in continuous time: the limit of ever more steps between the same two noise levels, which
depends on the levels at its ends alone (Kingma et al. 2021, "Variational diffusion models", section 5).

    -log p(x_0) <= prior + 1/2 integral of E |x_0 - x_0_hat|^2 dSNR + decoder

Integrated over l = log(1 + SNR) = -2 log sin(angle), where it is 1/2 E |x_0 - x_0_hat|^2 / sin(angle)^2 dl: half the
squared error of the velocity v (Kingma & Gao 2023, who write it for each prediction). It is log-SNR where there is
little noise, but finite where alpha = 0, and such that the integrand of N(0, 1) data is constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diffkern.likelihood.denoiser import Denoiser, Levels
from diffkern.likelihood.inputs import positive
from diffkern.likelihood.pairs import Pairs, neighbour_variance
from diffkern.likelihood.result import Likelihood
from diffkern.likelihood.vlb import vlb_table
from diffkern.ops.vlb_term import C1, CLIP, A, B
from diffkern.schedules import Schedule, one_of


@torch.no_grad()
def vdm(
    model: Any,
    x: Tensor,
    schedule: Schedule | None = None,
    *,
    labels: Any = None,
    points: int = 64,
    variance: str = "fixed_small",
    decoder: str = "discretized",
    clip: float | None = None,
    draws: int = 1,
    seed: int = 0,
    sample_ids: Iterable[int] | None = None,
    batch_size: int = 128,
    progress: bool | None = None,
) -> Likelihood:
    """The continuous-time variational bound, between the schedule's first and last noise level: log_p is at most
    log p(x) but for the Monte-Carlo noise. The prior and the decoder, with its fixed variance, are those of `vlb`: what
    lies between the two bounds is what finite steps cost.

    points: the times of a sample, one at random in each of as many equal parts of l: like the one shared offset of
    Kingma et al. 2021, appendix I.1, it spreads them evenly, but it leaves no error of the ends. draws: how often that
    is repeated, with other times and noise. The rest is as in `vlb`.

    stderr: of the noise of x_t and of the times. Each point is judged by its neighbours in l, as part of a smooth
    curve; the decoder is drawn twice at least, and is judged by the spread. terms of the result: "prior" [n],
    "decoder" [n] and "diffusion" [n, points], from noise to data.
    Raises ValueError for arguments that are not these, with a sentence that says what is allowed."""
    denoiser = Denoiser.of(model, schedule)
    schedule = denoiser.schedule
    one_of("variance", variance, ("fixed_small", "fixed_large"))
    ends = vlb_table(schedule, variance, decoder, clip)
    positive(draws=draws)
    if points < 3:
        raise ValueError(f"points must be at least 3, not {points}")
    pairs = Pairs.of(denoiser, x, labels, seed, sample_ids, batch_size, progress, levels=decoder == "discretized")
    n, repeats = len(pairs.x), max(2, draws)  # of the decoder

    high, low = (-2 * torch.tensor(denoiser.angles, dtype=torch.float64).sin().log()).tolist()
    u = torch.stack([pairs.uniforms(points, r) for r in range(draws)], 1)
    at = low + (high - low) / points * (torch.arange(points) + u).reshape(-1)
    sin = torch.exp(-at / 2)
    levels = denoiser.at_angle(torch.atan2(sin, (-torch.expm1(-at)).sqrt()))
    levels = Levels(*(torch.cat([a, b.cpu()]) for a, b in zip(_first(denoiser), levels, strict=True)))
    table = torch.zeros(len(at) + 1, ends.shape[1], dtype=torch.float64)
    (table[:, A], table[:, B]), table[:, CLIP] = denoiser.x0_weights(levels), ends[0, CLIP]
    table[1:, C1] = ((high - low) / points) ** 0.5 / sin
    table[0] = ends[0]
    rows = 1 + torch.arange(len(at)).reshape(n, draws * points)
    rows = torch.cat([torch.zeros(n, repeats, dtype=torch.int64), rows], 1)
    each = pairs.terms(levels, table, rows, learned=False, name="vdm")

    first, curves = each[:, :repeats], each[:, repeats:].reshape(n, draws, points)
    diffusion, prior, decoder_terms = curves.mean(1), pairs.prior(), first.mean(1)
    of_points = neighbour_variance(curves.flatten(0, 1)).reshape(n, draws, points).mean(1) / draws
    of_decoder = first.var(1) / repeats
    found = {"prior": prior, "diffusion": diffusion, "decoder": decoder_terms}
    errors = {"prior": torch.zeros_like(prior), "diffusion": of_points.sqrt(), "decoder": of_decoder.sqrt()}
    stderr = (of_decoder + of_points.sum(1)).sqrt()
    return Likelihood(-(prior + diffusion.sum(1) + decoder_terms), stderr, pairs.dims, "vdm", found, errors)


def _first(denoiser: Denoiser) -> Levels:
    return Levels(*(v.cpu() for v in denoiser.at(torch.zeros(1, dtype=torch.int64))))

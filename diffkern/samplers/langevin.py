"""Langevin dynamics, x + step score + sqrt(2 step) z: by itself, down a ladder of noise levels (annealed: Song & Ermon
2019), or as the corrector of what a sampler predicts (Song et al. 2021).

A row draws at one noise level, where the score is (alpha x_0 - x) / sigma^2 with the model's x_0.
"""

from __future__ import annotations

from itertools import pairwise

from diffkern.samplers.ddpm import posterior, step_variance
from diffkern.samplers.grid import Spacing, grid, initial_scale, row
from diffkern.samplers.table import X0, Table, Weights, X
from diffkern.schedules import Schedule


def langevin(alpha: float, sigma: float, snr: float) -> tuple[Weights, float]:
    """x after a step without its noise, and the noise's standard deviation.

    The step is 2 (snr |z| / |score|)^2 (Song et al. 2021, algorithm 4), with the norms that are expected under
    x = alpha x_0 + sigma epsilon in place of those of a batch, sqrt(D) and sqrt(D) / sigma: 2 (snr sigma)^2. That of
    Song & Ermon 2019 is the same: their epsilon / sigma_L^2 is 4 snr^2."""
    return X + 2 * snr**2 * (alpha * X0 - X), 2 * snr * sigma


def check(snr: float, langevin_steps: int) -> None:
    """Raise ValueError for a step that overshoots, or for no steps."""
    if not 0 < snr < 1:  # at 1 a step goes to the other side of x_0, as far as it was
        raise ValueError(f"snr must be between 0 and 1, not {snr}")
    if langevin_steps < 1:
        raise ValueError(f"langevin_steps must be at least 1, not {langevin_steps}")


def annealed_langevin(
    schedule: Schedule,
    steps: int,
    *,
    langevin_steps: int = 20,
    snr: float = 0.4,
    clip: float | None = None,
    spacing: Spacing = None,
) -> Table:
    """Song & Ermon 2019, algorithm 1: langevin_steps model calls at each of `steps` levels of x / alpha, then x_0
    (Jolicoeur-Martineau et al. 2021, section 3.1). Levels fall by one factor, as the paper's do, unless told otherwise.

    x follows the levels late: its variance is too large by about a share
    log(sigma_1 / sigma_L) / (2 snr^2 steps langevin_steps), 8% for 20 steps of `linear`. The paper's epsilon = 2e-5 at
    sigma_L = 0.01 is snr = 0.22, which wants three times as many model calls. A larger snr has another price: a step
    that is not tested and refused (Metropolis) widens what it converges to, the variance of the noise by
    1 / (1 - snr^2), and the weights of modes far apart come out more even than they are.

    Raises ValueError for a flow: its noise has no finite level sigma / alpha to start from."""
    check(snr, langevin_steps)
    if schedule.path == "flow":
        raise ValueError("annealed_langevin needs a finite noise level to start from, not path 'flow': take ddim")
    points = grid(schedule, steps, "exponential" if spacing is None else spacing, integer=False, positive_alpha=True)
    rows = []
    for p in points[:-1]:
        x, noise = langevin(1.0, p.ratio, snr)
        rows += [row(schedule, p, x, clip=clip, scaled=True, noise=noise)] * langevin_steps
    rows.append(row(schedule, points[-2], X0, clip=clip, scaled=True))
    return Table(rows, points[0].ratio, name="annealed_langevin")


def predictor_corrector(
    schedule: Schedule,
    steps: int,
    *,
    langevin_steps: int = 1,
    snr: float = 0.16,
    clip: float | None = None,
    spacing: Spacing = None,
) -> Table:
    """Song et al. 2021, algorithm 2: a step of the reverse diffusion to the next level (of a variance-preserving
    schedule their ancestral step, eq. 4), then langevin_steps corrections there; neither noise nor corrections at the
    end. So steps + (steps - 1) langevin_steps model calls."""
    check(snr, langevin_steps)
    points = grid(schedule, steps, spacing)
    rows = []
    for t, s in pairwise(points):
        mean, _ = posterior(t, s)
        if s is points[-1]:
            rows.append(row(schedule, t, mean, clip=clip))
            break
        rows.append(row(schedule, t, mean, clip=clip, noise=step_variance(t, s) ** 0.5))
        x, noise = langevin(s.alpha, s.sigma, snr)
        rows += [row(schedule, s, x, clip=clip, noise=noise)] * langevin_steps
    return Table(rows, initial_scale(schedule, points[0]), name="predictor_corrector")

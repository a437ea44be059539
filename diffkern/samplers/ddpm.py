"""Ancestral sampling (DDPM: Ho et al. 2020) and its generalisation with less noise (DDIM: Song et al. 2021)."""

from __future__ import annotations

from itertools import pairwise

from diffkern.samplers.grid import Point, Spacing, grid, initial_scale, row
from diffkern.samplers.table import X0, M, Table, Weights, X
from diffkern.schedules import Schedule, one_of


def step_variance(t: Point, s: Point) -> float:
    """Variance of x_t given x_s, for s cleaner than t (Kingma et al. 2021, eq. 2); beta_t for neighbouring steps."""
    return t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2


def posterior(t: Point, s: Point, beta: float | None = None) -> tuple[Weights, float]:
    """Mean and variance of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7; Kingma et al. 2021, eq. 3). beta: the variance of
    x_t given x_s, where it is known."""
    beta = step_variance(t, s) if beta is None else beta
    mean = t.alpha / s.alpha * s.sigma**2 / t.sigma**2 * X + s.alpha * beta / t.sigma**2 * X0
    return mean, beta * s.sigma**2 / t.sigma**2


def ddim_step(t: Point, s: Point, epsilon: Weights, eta: float) -> tuple[Weights, float]:
    """x_s without its noise, and the noise's standard deviation (Song et al. 2021, eq. 12 and 16)."""
    std = eta * posterior(t, s)[1] ** 0.5
    return s.alpha * X0 + max(s.sigma**2 - std**2, 0.0) ** 0.5 * epsilon, std


def ddpm(
    schedule: Schedule,
    steps: int,
    *,
    variance: str = "fixed_small",
    clip: float | None = None,
    spacing: Spacing = None,
) -> Table:
    """Samples x_s from q(x_s | x_t, x_0) at the predicted x_0.

    variance: that of the posterior ("fixed_small") or the larger beta_t ("fixed_large"), Ho et al. 2020, section 3.2.
    No noise in the last step. Raises ValueError for an option that is not one of these."""
    one_of("variance", variance, ("fixed_small", "fixed_large"))
    points = grid(schedule, steps, spacing)
    rows = []
    for t, s in pairwise(points):
        mean, var = posterior(t, s)
        if variance == "fixed_large":
            var = step_variance(t, s)
        rows.append(row(schedule, t, mean, clip=clip, noise=var**0.5 if s is not points[-1] else 0.0))
    return Table(rows, initial_scale(schedule, points[0]), name="ddpm")


def ddim(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    clip: float | None = None,
    use_clipped_model_output: bool = False,
    spacing: Spacing = None,
    final: str = "zero",
) -> Table:
    """Song et al. 2021, eq. 12: x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) epsilon + std z, with std = eta times the
    posterior's (eq. 16): 0 is deterministic, 1 is DDPM.

    clip bounds x_0 but leaves epsilon as predicted, unless use_clipped_model_output. The step goes to the next
    timestep of the grid, whatever the spacing."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    points = grid(schedule, steps, spacing, final=final)
    rows = []
    for t, s in pairwise(points):
        a, b = schedule.epsilon_weights(t.alpha, t.sigma)
        epsilon = (X - t.alpha * X0) / t.sigma if use_clipped_model_output else a * X + b * M
        x, std = ddim_step(t, s, epsilon, eta)
        rows.append(row(schedule, t, x, clip=clip, noise=std))
    return Table(rows, initial_scale(schedule, points[0]), name="ddim")

"""Heun's second-order method for the probability-flow ODE, without noise and with EDM's churn (Karras et al. 2022).

The state is x / alpha, of noise level sigma / alpha. A step is two model calls: an Euler step from the base to the next
level, and the correction by the average of the two slopes.
"""

from __future__ import annotations

import math
from itertools import pairwise

from diffkern.samplers.euler import euler_step, init_scale
from diffkern.samplers.grid import Point, Spacing, at_ratio, grid, row
from diffkern.samplers.table import BASE, X0, Row, Table, Weights, X
from diffkern.schedules import Schedule


def heun(
    schedule: Schedule, steps: int, *, clip: float | None = None, spacing: Spacing = None, final: str = "zero"
) -> Table:
    """Karras et al. 2022, algorithm 1: 2 steps - 1 model calls (the last step, to zero noise, is Euler's)."""
    points = grid(schedule, steps, spacing, final=final, integer=False, positive_alpha=True)
    rows = [r for s, t in pairwise(points) for r in heun_step(schedule, s, t, clip)]
    return Table(rows, init_scale(schedule, points[0].ratio, spacing), name="heun")


def edm(
    schedule: Schedule,
    steps: int,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    clip: float | None = None,
    spacing: Spacing = "karras",
) -> Table:
    """Karras et al. 2022, algorithm 2: before each step from a level in [s_tmin, s_tmax], noise raises it by the factor
    1 + gamma. The noise is drawn by the row that ends at the level; the first is part of init_scale."""
    if s_churn < 0 or s_noise < 0:
        raise ValueError(f"s_churn and s_noise must not be negative, but are {s_churn} and {s_noise}")
    points = grid(schedule, steps, spacing, integer=False, positive_alpha=True)

    def churn(p: Point) -> tuple[Point, float]:
        """The point of the raised level, and the scale of the noise that raises it."""
        gamma = min(s_churn / steps, 2**0.5 - 1) if p.sigma and s_tmin <= p.ratio <= s_tmax else 0.0
        raised = (1 + gamma) * p.ratio
        return (at_ratio(schedule, raised), s_noise * (raised**2 - p.ratio**2) ** 0.5) if gamma else (p, 0.0)

    rows: list[Row] = []
    for s, t in pairwise(points):
        rows += heun_step(schedule, churn(s)[0], t, clip, noise=churn(t)[1])
    return Table(rows, math.hypot(points[0].ratio, churn(points[0])[1]), name="edm")


def heun_step(schedule: Schedule, s: Point, t: Point, clip: float | None, noise: float = 0.0) -> list[Row]:
    """The rows of a step from s to t, with fresh noise after the last."""
    predict = euler_step(s.ratio, t.ratio)
    if t.sigma == 0:
        return [row(schedule, s, predict, clip=clip, scaled=True, noise=noise)]
    correct = average_slope(s.ratio, t.ratio, X - BASE)
    return [
        row(schedule, s, predict, clip=clip, scaled=True, base=X),
        row(schedule, t, correct, clip=clip, scaled=True, noise=noise),
    ]


def average_slope(s: float, t: float, first: Weights) -> Weights:
    """base + (t - s) (d + d') / 2, with d' = (x - x_0) / t. first: (t - s) d, which is x - base for Euler's x."""
    return BASE + (first + (t - s) / t * (X - X0)) / 2

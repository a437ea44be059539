"""DPM-Solver++ multistep (Lu et al. 2022, "DPM-Solver++"), of order 2 and 3, and the SDE variant of order 2.

In lambda = log(alpha / sigma) the diffusion ODE is linear up to the data prediction x_0, so a step from s to t with
h = lambda_t - lambda_s integrates a polynomial through the past predictions exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from diffkern.samplers.grid import Point, Spacing, grid, initial_scale, row
from diffkern.samplers.table import H0, H1, X0, Table, Weights, X
from diffkern.schedules import Schedule, one_of


def dpmpp_2m(
    schedule: Schedule,
    steps: int,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    clip: float | None = None,
    spacing: Spacing = None,
    final: str = "zero",
) -> Table:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2. solver_type: how the slope of x_0 is integrated, by its
    "midpoint" (the paper) or exactly ("heun"). lower_order_final: order 1 in the last step of fewer than 15."""
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    points = grid(schedule, steps, spacing, final=final, open_end=True, positive_alpha=True)
    return _multistep("dpmpp_2m", schedule, points, 2, solver_type, lower_order_final, clip)


def dpmpp_3m(
    schedule: Schedule,
    steps: int,
    *,
    solver_type: str = "midpoint",
    third_order: bool = False,
    lower_order_final: bool = True,
    clip: float | None = None,
    spacing: Spacing = None,
    final: str = "zero",
) -> Table:
    """DPM-Solver++(3M): also the curvature of x_0. solver_type: of the steps of order 2, at the ends.
    lower_order_final: orders 2 and 1 in the last two of fewer than 15 steps.

    The authors' code, and diffusers, take the second divided difference, f'' / 2, for f'': a small error, but one of
    second order. third_order counts it in full."""
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    points = grid(schedule, steps, spacing, final=final, open_end=True, positive_alpha=True)
    scale = 2.0 if third_order else 1.0
    return _multistep("dpmpp_3m", schedule, points, 3, solver_type, lower_order_final, clip, curvature_scale=scale)


def dpmpp_2m_sde(
    schedule: Schedule,
    steps: int,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    clip: float | None = None,
    spacing: Spacing = None,
    final: str = "zero",
) -> Table:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix; k-diffusion's dpmpp_2m_sde): the reverse SDE, with its noise."""
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    points = grid(schedule, steps, spacing, final=final, open_end=True, positive_alpha=True)
    return _multistep("dpmpp_2m_sde", schedule, points, 2, solver_type, lower_order_final, clip, sde=True)


def _multistep(
    name: str,
    schedule: Schedule,
    points: list[Point],
    order: int,
    solver_type: str,
    lower_order_final: bool,
    clip: float | None,
    sde: bool = False,
    curvature_scale: float = 1.0,
) -> Table:
    rows = []
    steps = len(points) - 1
    for i, (s, t) in enumerate(pairwise(points)):
        k = min(order, i + 1)
        if lower_order_final and steps < 15:
            k = min(k, steps - i)
        slopes = slopes_of_past(s, t, [points[i - j] for j in range(1, k)], X0)
        exact = k > 2 or solver_type == "heun"
        x, noise = solver_step(s, t, X, X0, slopes, exact=exact, sde=sde, curvature_scale=curvature_scale)
        rows.append(row(schedule, s, x, clip=clip, noise=noise, push=X0))
    return Table(rows, initial_scale(schedule, points[0]), name=name)


def slopes_of_past(s: Point, t: Point, past: Sequence[Point], newest: Weights) -> list[Weights]:
    """The slope at s, and with two past points half the curvature, of the polynomial through the newest prediction, at
    s, and those at the past points (H0, H1), per step from s to t."""
    h = t.lam - s.lam
    if not past or t.sigma == 0 or h == 0:  # at h = inf the prediction is the answer, at h = 0 there is no step to take
        return []
    r0 = (s.lam - past[0].lam) / h
    slope = (newest - H0) / r0
    if len(past) == 1:
        return [slope]
    r1 = (past[0].lam - past[1].lam) / h
    older = (H0 - H1) / r1
    curvature = (slope - older) / (r0 + r1)
    return [slope + r0 * curvature, curvature]


def solver_step(
    s: Point,
    t: Point,
    x: Weights,
    prediction: Weights,
    slopes: Sequence[Weights] = (),
    *,
    exact: bool = True,
    sde: bool = False,
    curvature_scale: float = 1.0,
    curvature_shift: float = 0.5,
) -> tuple[Weights, float]:
    """From x at s to t with the x_0 prediction at s, its slope and curvature; and the scale of the SDE's noise.

    exact: how the slope is integrated, exactly or by its midpoint. curvature_scale, curvature_shift: 2 and 1/2 are
    Taylor's."""
    h = t.lam - s.lam
    # Twice the decay with the noise of the SDE (eq. 18); z = -h or -2 h, expm1(z) = e^z - 1.
    z = -2 * h if sde else -h
    x = t.sigma / s.sigma * (math.exp(-h) if sde else 1.0) * x - t.alpha * math.expm1(z) * prediction
    if slopes:
        x = x + t.alpha * (1 - expm1_over(z) if exact else -0.5 * math.expm1(z)) * slopes[0]
    if len(slopes) > 1:
        x = x - t.alpha * ((expm1_over(z) - 1) / z - curvature_shift) * curvature_scale * slopes[1]
    return x, t.sigma * (-math.expm1(-2 * h)) ** 0.5 if sde else 0.0


def expm1_over(z: float) -> float:
    """(e^z - 1) / z, 1 at z = 0."""
    return math.expm1(z) / z if z else 1.0

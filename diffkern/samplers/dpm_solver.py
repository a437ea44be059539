"""DPM-Solver++ multistep (Lu et al. 2022, "DPM-Solver++"), of order 2 and 3, and the SDE variant of order 2.

In lambda = log(alpha / sigma) the diffusion ODE is linear up to the data prediction x_0, so a step from s to t with
h = lambda_t - lambda_s integrates a polynomial through the past predictions exactly.
"""

from __future__ import annotations

import math
from itertools import pairwise

from diffkern.samplers.grid import Point, Spacing, grid, initial_scale, row
from diffkern.samplers.table import H0, H1, X0, Table, X
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
    curvature = 2.0 if third_order else 1.0
    return _multistep("dpmpp_3m", schedule, points, 3, solver_type, lower_order_final, clip, curvature_scale=curvature)


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
        h = t.lam - s.lam
        k = min(order, i + 1)
        if lower_order_final and steps < 15:
            k = min(k, steps - i)
        if t.sigma == 0 or h == 0:  # at h = inf x_0 itself is the answer, at h = 0 there is no step to take
            k = 1
        # Twice the decay with the noise of the SDE (eq. 18); z = -h or -2 h, expm1(z) = e^z - 1.
        z = -2 * h if sde else -h
        x = t.sigma / s.sigma * (math.exp(-h) if sde else 1.0) * X - t.alpha * math.expm1(z) * X0
        if k > 1:
            r0 = (s.lam - points[i - 1].lam) / h
            slope = (X0 - H0) / r0
            if k > 2:
                r1 = (points[i - 1].lam - points[i - 2].lam) / h
                older = (H0 - H1) / r1
                curvature = (slope - older) / (r0 + r1)
                slope = slope + r0 * curvature
                x = x - t.alpha * ((expm1_over(z) - 1) / z - 0.5) * curvature_scale * curvature
            exact = k > 2 or solver_type == "heun"
            x = x + t.alpha * (1 - expm1_over(z) if exact else -0.5 * math.expm1(z)) * slope
        noise = t.sigma * (-math.expm1(-2 * h)) ** 0.5 if sde else 0.0
        rows.append(row(schedule, s, x, clip=clip, noise=noise, push=X0))
    return Table(rows, initial_scale(schedule, points[0]), name=name)


def expm1_over(z: float) -> float:
    """(e^z - 1) / z, 1 at z = 0."""
    return math.expm1(z) / z if z else 1.0

"""DEIS: exponential integration of a polynomial through past noise predictions (Zhang & Chen 2023), log-rho variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from diffkern.samplers.grid import Point, Spacing, grid, initial_scale, row
from diffkern.samplers.table import H0, H1, X0, Table, Weights, X
from diffkern.schedules import Schedule


def deis(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    clip: float | None = None,
    spacing: Spacing = None,
    final: str = "sigma_min",
) -> Table:
    """tAB-DEIS of order 1 to 3 (Zhang & Chen 2023, section 3): with rho = sigma / alpha, x/alpha moves from s to t by
    the integral over rho of epsilon, a polynomial in log rho through the last `order` predictions.

    lower_order_final: orders 2 and 1 in the last steps of fewer than 15. final: as diffusers, the end is the
    schedule's smallest noise level unless "zero"."""
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    points = grid(schedule, steps, spacing, final=final, open_end=True, positive_alpha=True)
    rows = []
    for i, (s, t) in enumerate(pairwise(points)):
        k = min(order, i + 1, steps - i if lower_order_final and steps < 15 else order)
        epsilon = (X - s.alpha * X0) / s.sigma
        x = deis_step([points[i - j] for j in range(k)], t, epsilon)
        rows.append(row(schedule, s, x, clip=clip, push=epsilon))
    return Table(rows, initial_scale(schedule, points[0]), name="deis")


def deis_step(past: Sequence[Point], t: Point, epsilon: Weights) -> Weights:
    """From x at past[0] to t. past: where the newest predictions were made, of which epsilon is the newest."""
    s = past[0]
    # Nodes log(rho / rho_s) of the predictions; the weights integrate powers of it exactly.
    nodes = [s.lam - p.lam for p in past]
    moments = [s.ratio * _integral(s.lam - t.lam, n) for n in range(len(past))]
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()
    x = t.alpha / s.alpha * X
    for weight, prediction in zip(weights, (epsilon, H0, H1), strict=False):
        x = x + t.alpha * weight * prediction
    return x


def _integral(u: float, n: int) -> float:
    """The integral of v^n e^v over v from 0 to u, for u <= 0 (and -inf)."""
    if n == 0:
        return math.expm1(u)
    return (u**n * math.exp(u) if math.isfinite(u) else 0.0) - n * _integral(u, n - 1)

"""UniPC: a unified predictor-corrector for the diffusion ODE (Zhao et al. 2023), data prediction, orders 1 to 3.

Each model call, at the predicted point, serves twice: to correct that point, and to predict the next one. So a call is
one row, which reads the corrected point before it (base) and leaves its own.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from diffkern.samplers.grid import Point, Spacing, grid, initial_scale, row
from diffkern.samplers.table import BASE, H0, H1, H2, X0, Table, Weights, X
from diffkern.schedules import Schedule, one_of


def unipc(
    schedule: Schedule,
    steps: int,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: tuple[int, ...] = (),
    clip: float | None = None,
    spacing: Spacing = None,
    final: str = "zero",
) -> Table:
    """UniP-p and UniC-p (Zhao et al. 2023, algorithms 5 and 6). order: p, 1 to 3. solver_type: B(h) = h ("bh1") or
    e^h - 1 ("bh2"). disable_corrector: the steps after which not to correct. lower_order_final: order 1 at the end.
    Raises ValueError for an option that is not one of these."""
    one_of("solver_type", solver_type, ("bh1", "bh2"))
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    points = grid(schedule, steps, spacing, final=final, open_end=True, positive_alpha=True)
    rows = []
    last_order = 0
    for i, (s, t) in enumerate(pairwise(points)):
        past = [points[i - j] for j in range(1, min(i, 3) + 1)]
        x = X
        if i > 0 and i - 1 not in disable_corrector:
            # From the point before (base, its prediction H0) to this one, whose prediction X0 is the newest node.
            x = unified_step(past[0], s, BASE, [H0, H1, H2], past[1:last_order], solver_type, corrector=X0)
        last_order = min(order, i + 1, steps - i if lower_order_final else order)
        if t.sigma == 0 and not lower_order_final:
            last_order = 1  # there x_0 itself is the answer, and the higher orders divide by h = infinity
        ahead = unified_step(s, t, x, [X0, H0, H1], past[: last_order - 1], solver_type)
        rows.append(row(schedule, s, ahead, clip=clip, push=X0, base=x))
    return Table(rows, initial_scale(schedule, points[0]), name="unipc")


def unified_step(
    s: Point, t: Point, x: Weights, data: list[Weights], older: list[Point], kind: str, corrector: Weights | None = None
) -> Weights:
    """From x at s to t. data: the x_0 predictions at s and at the `older` points before it; corrector: the one at t.

    Zhao et al. 2023, eq. 9, for data prediction: with m_j the prediction at lambda_s + r_j h,
    x_t = sigma_t / sigma_s x - alpha_t (e^-h - 1) m_0 - alpha_t B(h) sum_j rho_j (m_j - m_0) / r_j,
    where the rho solve sum_j rho_j r_j^(n-1) = moment_n / B(h) for n = 1, 2, ..."""
    h = t.lam - s.lam
    if h == 0:  # the last step to sigma_min, where the spacing ends there too
        return x
    m0 = data[0]
    x = t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * m0
    r = [(p.lam - s.lam) / h for p in older]
    slopes = [(m - m0) / rj for m, rj in zip(data[1:], r, strict=False)]
    if corrector is not None:
        r, slopes = [*r, 1.0], [*slopes, corrector - m0]
    if not r:
        return x
    B = -h if kind == "bh1" else math.expm1(-h)
    rho = np.array([0.5])  # of one slope, as the authors' code: the solution up to higher order in h
    if len(r) > 1:
        rho = np.linalg.solve(np.vander(r, increasing=True).T, _moments(-h, len(r)) / B)
    for rho_j, slope in zip(rho.tolist(), slopes, strict=True):
        x = x - t.alpha * B * rho_j * slope
    return x


def _moments(z: float, n: int) -> np.ndarray:
    """z k! phi_{k+1}(z) for k = 1..n, where phi_1 = (e^z - 1) / z and phi_{k+1} = (phi_k - 1 / k!) / z (eq. 10)."""
    phi = math.expm1(z) / z - 1
    moments = []
    for k in range(1, n + 1):
        moments.append(phi * math.factorial(k))
        phi = phi / z - 1 / math.factorial(k + 1)
    return np.array(moments)

"""PLMS, the pseudo linear multistep method of PNDM (Liu et al. 2022), without the Runge-Kutta warm-up."""

from __future__ import annotations

from itertools import pairwise

from diffkern.samplers.grid import Point, Spacing, grid, row
from diffkern.samplers.table import BASE, H0, H1, H2, M, Table, Weights, X
from diffkern.schedules import Schedule


def plms(schedule: Schedule, steps: int, *, spacing: Spacing = None, final: str = "sigma_min") -> Table:
    """DDIM steps (Liu et al. 2022, eq. 11) of an Adams-Bashforth average of the model's last outputs (eq. 12).

    steps + 1 model calls: the first step is corrected by a second call at its end. The average is of outputs, whatever
    they predict, so x_0 is never made and there is no clip. final: as diffusers, the schedule's smallest noise level
    unless "zero". Raises ValueError for fewer than 2 steps."""
    if steps < 2:
        raise ValueError(f"plms needs at least 2 steps, not {steps}")
    points = grid(schedule, steps, spacing, final=final)

    def transfer(s: Point, t: Point, x: Weights, output: Weights) -> Weights:
        """The DDIM step from x at s to t, given the model's output."""
        a, b = schedule.x0_weights(s.alpha, s.sigma)
        c, d = schedule.epsilon_weights(s.alpha, s.sigma)
        return t.alpha * (a * x + b * output) + t.sigma * (c * x + d * output)

    first, second = points[:2]
    rows = [
        row(schedule, first, transfer(first, second, X, M), clip=None, push=M, base=X),
        # The first step again, by the trapezoidal rule. Its output is not kept: pushing H0 again keeps the history.
        row(schedule, second, transfer(first, second, BASE, (M + H0) / 2), clip=None, push=H0),
    ]
    for i, (s, t) in enumerate(pairwise(points[1:])):
        rows.append(row(schedule, s, transfer(s, t, X, _adams_bashforth(i)), clip=None, push=M))
    return Table(rows, name="plms")


def _adams_bashforth(i: int) -> Weights:
    """Order 2, 3, then 4, over the newest output and the history."""
    match i:
        case 0:
            return (3 * M - H0) / 2
        case 1:
            return (23 * M - 16 * H0 + 5 * H1) / 12
    return (55 * M - 59 * H0 + 37 * H1 - 9 * H2) / 24

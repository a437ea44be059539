"""PLMS, the pseudo linear multistep method of PNDM (Liu et al. 2022), without the Runge-Kutta warm-up."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

from diffkern.samplers.grid import Point, Spacing, grid, initial_scale, row
from diffkern.samplers.table import BASE, H0, H1, H2, M, Table, Weights, X
from diffkern.schedules import Schedule, epsilon_weights, one_of, x0_weights


def plms(
    schedule: Schedule,
    steps: int,
    *,
    average: str | None = None,
    spacing: Spacing = None,
    final: str = "sigma_min",
) -> Table:
    """DDIM steps (Liu et al. 2022, eq. 11) with an Adams-Bashforth average of the last predictions (eq. 12).

    steps + 1 model calls: the first step is corrected by a second call at its end. average: of "epsilon", as in the
    paper, or of the model's "output": the default for flow prediction, where it is the slope itself; diffusers does so
    whatever is predicted, which for v is of first order only. x_0 is not made, so there is no clip. final: as
    diffusers, the schedule's smallest noise level unless "zero".
    Raises ValueError for fewer than 2 steps, and for an average of epsilon from alpha = 0."""
    if average is None:
        average = "output" if schedule.prediction == "flow" else "epsilon"
    one_of("average", average, ("epsilon", "output"))
    if steps < 2:
        raise ValueError(f"plms needs at least 2 steps, not {steps}")
    points = grid(schedule, steps, spacing, final=final)
    if average == "epsilon" and points[0].alpha == 0:
        raise ValueError("plms cannot average epsilon on a schedule of zero terminal SNR: take average='output'")

    def newest(p: Point) -> Weights:
        """The prediction that a call at p adds to the average."""
        a, b = schedule.epsilon_weights(p.alpha, p.sigma)
        return M if average == "output" else a * X + b * M

    averaged = "epsilon" if average == "epsilon" else schedule.prediction
    step = partial(transfer, averaged, sigma_data=schedule.sigma_data)

    first, second = points[:2]
    rows = [
        row(schedule, first, step(first, second, X, newest(first)), clip=math.inf, push=newest(first), base=X),
        # The first step again, by the trapezoidal rule. Its prediction is not kept: pushing H0 keeps the history.
        row(schedule, second, step(first, second, BASE, (newest(second) + H0) / 2), clip=math.inf, push=H0),
    ]
    for i, (s, t) in enumerate(pairwise(points[1:])):
        mean = adams_bashforth(i + 2, newest(s))
        rows.append(row(schedule, s, step(s, t, X, mean), clip=math.inf, push=newest(s)))
    return Table(rows, initial_scale(schedule, first), name="plms")


def transfer(prediction: str, s: Point, t: Point, x: Weights, m: Weights, sigma_data: float = 0.5) -> Weights:
    """The DDIM step from x at s to t (Liu et al. 2022, eq. 11), with the model output m or an average of them."""
    a, b = x0_weights(prediction, s.alpha, s.sigma, sigma_data)
    c, d = epsilon_weights(prediction, s.alpha, s.sigma, sigma_data)
    return t.alpha * (a * x + b * m) + t.sigma * (c * x + d * m)


def adams_bashforth(order: int, newest: Weights) -> Weights:
    """Order 1 to 4, over the newest prediction and the history (Liu et al. 2022, eq. 12)."""
    match order:
        case 1:
            return newest
        case 2:
            return (3 * newest - H0) / 2
        case 3:
            return (23 * newest - 16 * H0 + 5 * H1) / 12
    return (55 * newest - 59 * H0 + 37 * H1 - 9 * H2) / 24

"""The noise levels that a sampler visits: spacing, interpolation in the schedule, log signal-to-noise ratio.

The level of a point is sigma / alpha, or sigma for a flow (where sigma / alpha is infinite at the start).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from diffkern.samplers.table import Row, Weights
from diffkern.schedules import SPACINGS, Schedule, one_of, shift_sigma

# log(alpha / sigma) and sigma / alpha need alpha > 0. Where a schedule ends in alpha = 0, samplers that use them start
# this close to it instead; the values are those of diffusers.
SMALLEST_ALPHA = {"vp": 2.0**-12, "ve": 1.0, "flow": 1e-6}

Spacing = str | Sequence[float] | None


class Point(NamedTuple):
    """A noise level: x = alpha x_0 + sigma epsilon, and what the model is told there."""

    timestep: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of x / alpha."""
        return self.sigma / self.alpha

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log signal-to-noise ratio; infinite at sigma = 0."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


DATA = Point(0.0, 1.0, 0.0)


def point(path: str, level: float, timestep: float = 0.0) -> Point:
    """The point of a path at a noise level: sigma / alpha, or sigma for a flow."""
    if path == "flow":
        return Point(timestep, 1 - level, level)
    alpha = (1 + level**2) ** -0.5 if path == "vp" else 1.0
    return Point(timestep, alpha, level * alpha)


def grid(
    schedule: Schedule,
    steps: int,
    spacing: Spacing = None,
    *,
    final: str = "zero",
    integer: bool = True,
    open_end: bool = False,
    positive_alpha: bool = False,
) -> list[Point]:
    """The `steps` points at which the model is called, from noise to data, and the final one: steps + 1 points.

    spacing: one of SPACINGS, or the timesteps themselves (sigmas for EDM and flow), falling; None is the schedule's.
    final: where sampling ends, at "zero" noise or at the schedule's "sigma_min". integer: tell the model whole
    timesteps, but for those given. open_end: linspace and leading leave out the timestep 0 (as multistep solvers do).
    positive_alpha: keep away from alpha = 0. Raises ValueError for anything else, and for more steps than the schedule
    has timesteps."""
    T = len(schedule)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    one_of("final noise level", final, ("zero", "sigma_min"))
    spacing = schedule.spacing if spacing is None else spacing
    if not isinstance(spacing, str):
        if len(spacing) != steps:
            raise ValueError(f"{len(spacing)} explicit timesteps were given for {steps} steps")
        at = _at_index if schedule.path == "vp" else _at_level
        points = [at(schedule, float(t), positive_alpha) for t in spacing]
    elif spacing in ("karras", "exponential"):
        points = [_at_level(schedule, level, positive_alpha) for level in _ramp(schedule, steps, spacing)]
    else:
        one_of("spacing", spacing, SPACINGS)
        if steps > T:
            raise ValueError(f"{steps} steps are more than the schedule's {T} timesteps")
        indices = _indices(schedule, steps, spacing, rounded=integer and schedule.path == "vp", open_end=open_end)
        if not 0 <= indices[-1] <= indices[0] <= T - 1:
            raise ValueError(f"{steps} steps with {spacing} spacing and steps_offset leave the range 0..{T - 1}")
        points = [_at_index(schedule, t, positive_alpha) for t in indices]
    if any(s.sigma * t.alpha <= t.sigma * s.alpha for s, t in pairwise(points)):
        raise ValueError(f"{steps} steps with this spacing visit a noise level twice: take fewer")
    if integer and isinstance(spacing, str) and schedule.path != "ve":
        # As diffusers' integer timesteps: Karras' are rounded, all others are cast.
        points = [
            p._replace(timestep=math.floor(round(p.timestep) if spacing == "karras" else p.timestep)) for p in points
        ]
    return [*points, DATA if final == "zero" else _at_index(schedule, 0, False)]


def at_ratio(schedule: Schedule, ratio: float) -> Point:
    """The point of the schedule's path with sigma / alpha = ratio."""
    return _at_level(schedule, ratio / (1 + ratio) if schedule.path == "flow" else ratio, False)


def initial_scale(schedule: Schedule, first: Point) -> float:
    """The standard deviation of x at the first point, as diffusers has it: sigma if alpha = 1, else that of noise."""
    return first.sigma if schedule.path == "ve" else 1.0


def row(schedule: Schedule, p: Point, next: Weights, *, clip: float | None, scaled: bool = False, **fields: Any) -> Row:
    """The row of a model call at p. scaled: the state is x / alpha, of noise level sigma / alpha, in place of x.
    clip: the bound on |x_0|, None for the schedule's."""
    a, b = schedule.x0_weights(p.alpha, p.sigma)
    scale = p.alpha if scaled else 1.0
    return Row(
        timestep=p.timestep,
        x0=(a * scale, b),
        next=next,
        c_in=schedule.c_in(p.sigma) * scale,
        clip=bound(schedule, clip),
        **fields,
    )


def bound(schedule: Schedule, clip: float | None) -> float:
    """The bound on |x_0|: the schedule's if None. Raises ValueError unless it is positive."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, not {clip}")
    return schedule.clip if clip is None else clip


def _indices(schedule: Schedule, steps: int, spacing: str, *, rounded: bool, open_end: bool) -> list[float]:
    """Timestep indices, falling (Lin et al. 2024, table 2)."""
    T = len(schedule)
    indices: np.ndarray
    match spacing:
        case "linspace":
            last = 0.0
            if schedule.path == "flow" and not open_end:
                # diffusers' flow scheduler shifts the smallest sigma twice.
                last = T * shift_sigma(1 / T, schedule.shift) - 1
            indices = np.linspace(last, T - 1, steps + open_end)[::-1][:steps]
        case "leading":
            points = steps + open_end
            indices = (T // points * np.arange(points))[::-1][:steps] + float(schedule.steps_offset)
        case _:
            indices = T - np.arange(steps) * (T / steps)
            indices = (indices if schedule.path == "flow" else indices.round()) - 1
    return (indices.round() if rounded else indices).tolist()


def _levels(schedule: Schedule) -> np.ndarray:
    """The level at every timestep, rising."""
    if schedule.path == "flow":
        return schedule.sigma_t.numpy()
    alpha = schedule.alpha_t.numpy()
    smallest = SMALLEST_ALPHA[schedule.path]
    return np.where(alpha > 0, schedule.sigma_t.numpy(), (1 - smallest**2) ** 0.5) / np.where(
        alpha > 0, alpha, smallest
    )


def _ramp(schedule: Schedule, steps: int, spacing: str) -> list[float]:
    """Levels over the whole range: Karras et al. 2022, eq. 5, or evenly in the logarithm."""
    low, high = _levels(schedule)[[0, -1]]
    ramp = np.linspace(0, 1, steps)
    if spacing == "exponential":
        return np.exp(np.log(high) + ramp * np.log(low / high)).tolist()
    rho = schedule.rho
    return ((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho).tolist()


def _at_index(schedule: Schedule, t: float, positive_alpha: bool) -> Point:
    """The point at timestep index t, between two timesteps by linear interpolation of the level."""
    if schedule.path == "flow":
        return _at_level(schedule, shift_sigma((t + 1) / len(schedule), schedule.shift), positive_alpha)
    if not 0 <= t <= len(schedule) - 1:
        raise ValueError(f"timestep {t} is outside the schedule's 0..{len(schedule) - 1}")
    if t == int(t) and (schedule.alpha_t[int(t)] > 0 or not positive_alpha):
        p = Point(t, schedule.alpha_t[int(t)].item(), schedule.sigma_t[int(t)].item())
    else:
        p = _at_level(schedule, np.interp(t, np.arange(len(schedule)), _levels(schedule)).item(), positive_alpha)
    return p._replace(timestep=t) if schedule.path == "vp" else p._replace(timestep=math.log(p.sigma) / 4)


def _at_level(schedule: Schedule, level: float, positive_alpha: bool) -> Point:
    """The point of a noise level; what the model is told follows by interpolation of the logarithm."""
    if not level > 0 or (schedule.path == "flow" and level > 1 + 1e-12):
        raise ValueError(f"sigma {level} is not a noise level of the schedule")
    match schedule.path:
        case "flow":
            sigma = min(level, 1 - SMALLEST_ALPHA["flow"]) if positive_alpha else min(level, 1.0)
            return point("flow", sigma, len(schedule) * sigma)
        case "ve":
            return point("ve", level, math.log(level) / 4)
    t = np.interp(math.log(level), np.log(_levels(schedule)), np.arange(len(schedule))).item()
    return point("vp", level, t)

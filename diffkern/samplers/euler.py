"""Euler's method for the probability-flow ODE, in x / alpha over sigma / alpha (Karras et al. 2022), with fresh noise
(ancestral: Crowson's k-diffusion), and along the straight line of a flow (Lipman et al. 2023; Liu et al. 2023)."""

from __future__ import annotations

from itertools import pairwise

from diffkern.samplers.grid import Spacing, grid, row
from diffkern.samplers.table import X0, Table, Weights, X
from diffkern.schedules import Schedule


def euler_step(s: float, t: float) -> Weights:
    """x + (t - s) d with d = dx/dsigma = (x - x_0) / s, from noise level s to t."""
    return X + (t - s) / s * (X - X0)


def ancestral(s: float, t: float, eta: float = 1.0) -> tuple[float, float]:
    """The level to step to from s, and the noise that leads from there to t: down^2 + up^2 = t^2."""
    up = eta * t * (1 - (t / s) ** 2) ** 0.5
    return (t**2 - up**2) ** 0.5, up


def init_scale(schedule: Schedule, ratio: float, spacing: Spacing) -> float:
    """The standard deviation of x / alpha at the start. With leading spacing the first timestep is not the noisiest,
    and the unit variance of the data is counted in, as diffusers does."""
    leading = (schedule.spacing if spacing is None else spacing) == "leading"
    return (ratio**2 + 1) ** 0.5 if leading else ratio


def euler(
    schedule: Schedule, steps: int, *, clip: float | None = None, spacing: Spacing = None, final: str = "zero"
) -> Table:
    """Karras et al. 2022, algorithm 1 without its second-order correction."""
    points = grid(schedule, steps, spacing, final=final, integer=False, positive_alpha=True)
    rows = [row(schedule, s, euler_step(s.ratio, t.ratio), clip=clip, scaled=True) for s, t in pairwise(points)]
    return Table(rows, init_scale(schedule, points[0].ratio, spacing), name="euler")


def euler_a(
    schedule: Schedule, steps: int, *, eta: float = 1.0, clip: float | None = None, spacing: Spacing = None
) -> Table:
    """Euler to a level `down` below the next, then fresh noise `up` to it, down^2 + up^2 = next^2 (k-diffusion,
    get_ancestral_step). eta scales the noise: 0 is Euler."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    points = grid(schedule, steps, spacing, integer=False, positive_alpha=True)
    rows = []
    for p, q in pairwise(points):
        down, up = ancestral(p.ratio, q.ratio, eta)
        rows.append(row(schedule, p, euler_step(p.ratio, down), clip=clip, scaled=True, noise=up))
    return Table(rows, init_scale(schedule, points[0].ratio, spacing), name="euler_a")


def flow_euler(schedule: Schedule, steps: int, *, clip: float | None = None, spacing: Spacing = None) -> Table:
    """Euler in time along dx/dsigma = epsilon - x_0 = (x - x_0) / sigma, for a schedule with alpha = 1 - sigma (Liu et
    al. 2023). Raises ValueError for another schedule."""
    if schedule.path != "flow":
        raise ValueError(f"flow_euler is for a flow schedule, not for path {schedule.path!r}: take euler or ddim")
    points = grid(schedule, steps, spacing, integer=False)
    return Table(
        [row(schedule, s, euler_step(s.sigma, t.sigma), clip=clip) for s, t in pairwise(points)], name="flow_euler"
    )

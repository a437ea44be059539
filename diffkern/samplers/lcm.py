"""Multistep sampling of latent consistency models (Luo et al. 2023; Song et al. 2023, algorithm 1)."""

from __future__ import annotations

from itertools import pairwise

from diffkern.samplers.grid import grid, row
from diffkern.samplers.table import X0, Table, Weights, X
from diffkern.schedules import Schedule

SIGMA_DATA = 0.5  # of the boundary conditions, whatever the data (Song et al. 2023, appendix C)


def consistency(timestep: float, timestep_scaling: float) -> Weights:
    """The consistency function f = c_skip x + c_out x_0, which is x itself at timestep 0."""
    scaled = timestep * timestep_scaling
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
    return c_out * X0 + c_skip * X


def lcm(
    schedule: Schedule,
    steps: int,
    *,
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
    clip: float | None = None,
) -> Table:
    """The consistency function jumps to the data; fresh noise leads back to the next timestep.

    original_steps: of the distillation, whose timesteps k, 2k, ... (k = T / original_steps) the steps are taken from.
    Raises ValueError for more steps than those, or more of those than the schedule has."""
    if schedule.path != "vp":
        raise ValueError(f"lcm is for a variance-preserving schedule, not for path {schedule.path!r}")
    if not 1 <= steps <= original_steps <= len(schedule):
        raise ValueError(
            f"lcm needs 1 <= steps <= original_steps <= {len(schedule)}, not {steps} steps of {original_steps}"
        )
    origin = [(i + 1) * (len(schedule) // original_steps) - 1 for i in reversed(range(original_steps))]
    points = grid(schedule, steps, [origin[i * original_steps // steps] for i in range(steps)])
    rows = []
    for s, t in pairwise(points):
        x0 = consistency(s.timestep, timestep_scaling)
        rows.append(row(schedule, s, t.alpha * x0, clip=clip, noise=t.sigma))
    return Table(rows, name="lcm")

"""Samplers as tables of coefficients: `make_table("dpmpp_2m", schedule, steps)`.

A sampler is a function (schedule, steps, *, options) -> Table, written as in its paper; see table.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffkern.samplers.ddpm import ddim, ddpm
from diffkern.samplers.deis import deis
from diffkern.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from diffkern.samplers.euler import euler, euler_a, flow_euler
from diffkern.samplers.heun import edm, heun
from diffkern.samplers.langevin import annealed_langevin, predictor_corrector
from diffkern.samplers.lcm import lcm
from diffkern.samplers.plms import plms
from diffkern.samplers.table import Row as Row
from diffkern.samplers.table import Table
from diffkern.samplers.table import Weights as Weights
from diffkern.samplers.unipc import unipc
from diffkern.schedules import Schedule, one_of

SAMPLERS: dict[str, Callable[..., Table]] = {
    sampler.__name__: sampler
    for sampler in (
        ddpm,
        ddim,
        euler,
        euler_a,
        heun,
        dpmpp_2m,
        dpmpp_3m,
        dpmpp_2m_sde,
        unipc,
        plms,
        deis,
        lcm,
        edm,
        flow_euler,
        annealed_langevin,
        predictor_corrector,
    )
}


def options(name: str) -> list[str]:
    """The options that a sampler takes. Raises ValueError, naming the choices, for an unknown sampler."""
    one_of("sampler", name, SAMPLERS)
    return [p.name for p in inspect.signature(SAMPLERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


def make_table(name: str, schedule: Schedule, steps: int, **given: Any) -> Table:
    """The table of a sampler of SAMPLERS. Raises ValueError, naming what is allowed, for an unknown sampler or option,
    and for steps or values that the sampler cannot do."""
    taken = options(name)
    if unknown := sorted(set(given) - set(taken)):
        raise ValueError(f"{name} takes no option {', '.join(unknown)}: it takes {', '.join(taken)}")
    return SAMPLERS[name](schedule, steps, **given)

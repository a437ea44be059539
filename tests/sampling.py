"""What the sampler tests share: a table run by the reference op, and a diffusers scheduler run on the same noise."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffkern.ops.randn import noise_keys, normal
from diffkern.ops.sampler_step import C_IN, sampler_step
from diffkern.samplers.table import Table

SHAPE = (3, 4, 4)
KEYS = noise_keys(0, 2)
Model = Callable[[Tensor, float], Tensor]


@cache
def noise(draw: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The noise of KEYS, as `sampler_step` draws it: [2, *SHAPE]."""
    return normal(KEYS, SHAPE, draw, dtype)


def toy_model(x: Tensor, t: float) -> Tensor:
    """A smooth nonlinear function of x and of the timestep."""
    return 0.6 * torch.tanh(x + float(np.sin(t / 90))) + 0.3 * torch.cos(2 * x - t / 200) - 0.1 * t / 1000


def run_table(
    table: Table, model: Model, keys: Tensor = KEYS, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The states of a sampling run, the initial noise first: [B, *shape] each, by the reference op."""
    data = table.data.to(dtype)
    x = table.init_scale * normal(keys, shape, 0, dtype)
    base = h0 = h1 = h2 = torch.zeros_like(x)
    model_input, states = data[0, C_IN] * x, [x]
    for i, timestep in enumerate(table.timesteps):
        m = model(model_input, timestep)
        row = torch.full((len(x),), i)
        drawn = keys if table.rows[i].noise else None
        x, model_input, base, h = sampler_step.reference(x, m, data, row, drawn, None, base, h0, h1, h2)
        h0, h1, h2 = h, h0, h1
        states.append(x)
    return states


class _Wide:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def diffusers_in_float64(module: Any, randn_tensor: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, a scheduler's module computes in float64 where it says float32, on the noise of randn_tensor: the same
    algorithm, without its rounding."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.multiple(module, create=True, torch=_Wide(torch), np=_Wide(np), randn_tensor=randn_tensor):
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _diffusers_like_ours(module: Any, wide: bool) -> Iterator[None]:
    """Inside, the scheduler's module draws the noise that `sampler_step` draws, and with `wide` computes in float64."""
    draws = count(1)

    def randn_tensor(shape: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        assert tuple(shape) == (len(KEYS), *SHAPE)
        return noise(next(draws), dtype or torch.float64)

    inside = diffusers_in_float64(module, randn_tensor) if wide else patch.multiple(
        module, create=True, randn_tensor=randn_tensor
    )  # fmt: skip
    with inside:
        yield


def run_diffusers(
    name: str, config: dict[str, Any], steps: int, x: Tensor, model: Model, *, wide: bool = True, **step_options: Any
) -> list[Tensor]:
    """The states of a diffusers scheduler's run from x on the noise of KEYS, in float64 throughout if wide."""
    cls = getattr(diffusers, name)
    with _diffusers_like_ours(importlib.import_module(cls.__module__), wide):
        scheduler = cls(**config)
        scheduler.set_timesteps(steps)
        states = [x]
        for t in scheduler.timesteps:
            m = model(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, float(t))
            x = scheduler.step(m, t, x, **step_options).prev_sample
            states.append(x)
    return states


def max_delta(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any state, relative to its scale where that is above 1."""
    assert len(ours) == len(theirs), f"{len(ours) - 1} model calls against {len(theirs) - 1}"
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(ours, theirs, strict=True))

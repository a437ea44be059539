"""The way along the probability-flow ODE, from the angle of the data to that of the noise, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkern.likelihood.denoiser import Denoiser
from diffkern.likelihood.integrate import Solver
from diffkern.progress import progress_bar


@dataclass(frozen=True)
class Path:
    """From the angle of the data to that of the noise. grid: the angles between fixed steps. scale: the standard
    deviation s of y at the last angle."""

    denoiser: Denoiser
    solver: Solver
    grid: list[float]
    scale: float

    @classmethod
    def of(cls, denoiser: Denoiser, solver: Solver) -> Path:
        schedule = denoiser.schedule
        if schedule.prediction == "epsilon" and schedule.alpha_t[-1] == 0:
            raise ValueError(
                "a model that predicts epsilon knows nothing of x where alpha_t = 0: it must predict v or x0"
            )
        first, last = denoiser.angles
        # Where there is little noise all changes over a like share of it: measured on emoji-32, 20 steps of RK4 so are
        # nearer than 50 over equal numbers of timesteps.
        share = torch.linspace(0, 1, int(solver.steps) + 1, dtype=torch.float64)
        grid = (first * (last / first) ** share).tolist()
        grid[-1] = last  # not a rounding beyond it
        return cls(denoiser, solver, grid, math.sin(grid[-1]) if schedule.path == "ve" else 1.0)

    @property
    def first(self) -> float:
        return self.grid[0]

    def prior(self, y: Tensor) -> Tensor:
        """-log p(y) at the last angle, where y / s is taken to be standard normal: float64 [B]."""
        z = (y.to(torch.float64) / self.scale).flatten(1)
        return (0.5 * (z**2 + math.log(2 * math.pi)) + math.log(self.scale)).sum(1)

    def dtype(self, x: Tensor) -> torch.dtype:
        """What y is in: the model's dtype, or that of x for a callable, but at least float32."""
        return torch.promote_types(self.denoiser.dtype or x.dtype, torch.float32)


@contextmanager
def in_batches(total: int, batch_size: int, progress: bool | None, name: str) -> Iterator[Iterator[tuple[Tensor, Any]]]:
    """The indices of each batch, int64, with what a solver tells how much of it is done."""
    style = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with progress_bar(progress, total=total, desc=name, bar_format=style) as bar:

        def parts() -> Iterator[tuple[Tensor, Any]]:
            for part in torch.arange(total).split(batch_size) if total else ():

                def done(share: float, part: Tensor = part) -> None:
                    bar.update(part[0].item() + share * len(part) - bar.n)

                yield part, done
                done(1.0)

        yield parts()

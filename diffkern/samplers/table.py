"""A sampler is a table: one row of coefficients per model call, known before sampling starts.

A sampler is a function `(schedule, steps) -> Table` that works out its coefficients in float64, as its paper writes
them; the op `sampler_step` applies a row to a batch on the device. diffkern/ops/sampler_step.py says what a row does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from diffkern.ops.sampler_step import C_IN, CLIP, DRAW, NEXT, NEXT_BASE, NEXT_H, TERMS, WIDTH


class Weights(dict[str, float]):
    """A linear combination of the terms x, m (model output), x0, h0, h1, h2 (past entries, newest first) and base.

    The terms below can be added and scaled, so that a sampler's update is written as in its paper:
    `alpha * X0 + sigma * (X - a * X0) / s` is the Weights {"x0": alpha - sigma * a / s, "x": sigma / s}."""

    def __add__(self, other: Weights) -> Weights:
        return Weights({term: self.get(term, 0.0) + other.get(term, 0.0) for term in {**self, **other}})

    def __sub__(self, other: Weights) -> Weights:
        return self + -1.0 * other

    def __mul__(self, scale: float) -> Weights:
        return Weights({term: scale * weight for term, weight in self.items()})

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Weights:
        return Weights({term: weight / scale for term, weight in self.items()})


X, M, X0, H0, H1, H2, BASE = (Weights({term: 1.0}) for term in TERMS)


@dataclass(frozen=True)
class Row:
    """What one model call is given, and what is made of its output m.

    timestep: what the model is told. c_in: what x is scaled by before the model sees it. x0: (a, b) of the prediction
    x0 = a x + b m. clip: bound on |x0|. next: weights of the next sample. noise: scale of the fresh noise in it.
    push: weights of the new history entry. base: weights of the next base (default: base stays as it is)."""

    timestep: float
    x0: tuple[float, float]
    next: Mapping[str, float]
    noise: float = 0.0
    push: Mapping[str, float] = field(default_factory=Weights)
    base: Mapping[str, float] = field(default_factory=lambda: BASE)
    c_in: float = 1.0
    clip: float = math.inf

    def columns(self, draw: int) -> list[float]:
        """The row as `sampler_step` reads it. draw: the number of its noise."""
        values = [self.timestep, self.c_in, *self.x0, self.clip, self.noise, float(draw)] + [0.0] * (WIDTH - DRAW - 1)
        for block, weights in ((NEXT, self.next), (NEXT_BASE, self.base), (NEXT_H, self.push)):
            for term, weight in weights.items():
                values[block + TERMS.index(term)] = weight
        return values

    def check(self, name: str, index: int) -> None:
        """Raise ValueError for a coefficient that is not finite, or not real, in row `index` of table `name`."""
        columns = self.columns(0)
        columns[CLIP] = 0.0  # an infinite clip bound means no clipping
        if any(isinstance(c, complex) or not math.isfinite(c) for c in columns):
            raise ValueError(
                f"{name}: row {index} has a coefficient that is not finite; with this schedule the prediction type "
                "cannot give x0 there (a zero-terminal-SNR schedule needs v or x0 prediction)"
            )


# The row after the last: timestep 0, c_in 1.
END = [1.0 if column == C_IN else 0.0 for column in range(WIDTH)]


@dataclass(frozen=True)
class Table:
    """The rows of a sampler, for states of N(0, init_scale^2) at the start. Raises ValueError for a row with a
    coefficient that is not finite (for example x0 from epsilon where alpha_t = 0)."""

    rows: Sequence[Row]
    init_scale: float = 1.0
    name: str = "custom"

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"{self.name}: a table needs at least one row")
        for i, row in enumerate(self.rows):
            row.check(self.name, i)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def data(self) -> Tensor:
        """float64 [R + 1, 32] on the CPU. The last row is the end: timestep 0, c_in 1."""
        draws = accumulate(r.noise != 0 for r in self.rows)  # draw 0 is the initial noise
        columns = [r.columns(draw) for r, draw in zip(self.rows, draws, strict=True)]
        return torch.tensor([*columns, END], dtype=torch.float64)

    @property
    def timesteps(self) -> list[float]:
        return [r.timestep for r in self.rows]

    @property
    def noisy(self) -> bool:
        """Whether any row draws noise."""
        return any(r.noise for r in self.rows)

    @property
    def uses_base(self) -> bool:
        return any(w.get("base") for r in self.rows for w in (r.next, r.push))

    @property
    def history(self) -> int:
        """How many past entries (0 to 3) the rows read."""
        used = {t for r in self.rows for w in (r.next, r.push, r.base) for t, v in w.items() if v and t[0] == "h"}
        return max((int(t[1:]) + 1 for t in used), default=0)

"""Runge-Kutta along an ordinary differential equation, a batch at a time, with a step size of its own for each sample.

The state of a sample is y and the integrals q of numbers along its path (log p, for one): dy/ds and dq/ds at (s, y) are
the field's. Each sample has its own place s and step h, chosen and judged on the device, where `torch.where` accepts or
rejects its step: nothing that a sample does depends on the others in its batch, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern.layout import per_sample
from diffkern.likelihood.inputs import positive
from diffkern.schedules import one_of

Slope = tuple[Tensor, Tensor]
Field = Callable[[Tensor, Tensor], Slope]
"""(s float64 [B], y [B, ...]) -> (dy/ds [B, ...], dq/ds float64 [B, K])."""


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Hairer, Norsett & Wanner 1993, section II.1): slope i is taken at s + nodes[i] h
    and y + h sum_j weights[i][j] slope_j. error: weights of the difference to the embedded method."""

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    result: tuple[float, ...]
    error: tuple[float, ...] = ()


HEUN = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
RK4 = Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
_DOPRI5 = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DOPRI5 = Tableau(  # Dormand & Prince 1980: order 5, whose last slope is the first one of the next step
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5,
    ),
    (*_DOPRI5, 0),
    (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
FIXED = {"heun": HEUN, "rk4": RK4}
SOLVERS = ("dopri5", *FIXED)


@dataclass(frozen=True)
class Solver:
    """name: one of SOLVERS. steps: of "heun" and "rk4". rtol, atol: of "dopri5", whose step is accepted where the error
    is at most atol + rtol |y|, as the root mean square over y, and at most D atol + rtol |q| for the integrals, which
    are sums over D numbers. max_steps: of "dopri5". Raises ValueError for anything else."""

    name: str
    steps: int
    rtol: float
    atol: float
    max_steps: int = 1000

    def __post_init__(self) -> None:
        one_of("solver", self.name, SOLVERS)
        positive(steps=self.steps, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)


class Solution(NamedTuple):
    """y: [B, ...] at the end. integrals: float64 [B, K]. steps: int64 [B], what each sample took, with those that were
    rejected."""

    y: Tensor
    integrals: Tensor
    steps: Tensor


class NotSolved(ArithmeticError):
    """Samples did not get to the end of their path. The message says how many and why."""


def solve(
    field: Field, y: Tensor, grid: Sequence[float], solver: Solver, done: Callable[[float], None] = lambda share: None
) -> Solution:
    """Follow the field from grid[0] to grid[-1], over the points of the grid with a solver of fixed steps.

    y: [B, ...]. done: told now and then how much of the way lies behind the batch, from 0 to 1. Raises NotSolved."""
    run = _adaptive if solver.name == "dopri5" else _fixed
    solution = run(field, y, grid, solver, done)
    lost = ~(torch.isfinite(solution.y).flatten(1).all(1) & torch.isfinite(solution.integrals).all(1))
    if lost.any():
        raise NotSolved(f"the model's output led {int(lost.sum())} of {len(y)} samples to numbers that are not finite")
    return solution


def _fixed(field: Field, y: Tensor, grid: Sequence[float], solver: Solver, done: Callable[[float], None]) -> Solution:
    tableau = FIXED[solver.name]
    integrals: Tensor | None = None
    for i, (start, end) in enumerate(pairwise(grid)):
        s = torch.full((len(y),), start, dtype=torch.float64, device=y.device)
        h = torch.full_like(s, end - start)
        slopes = _slopes(field, tableau, s, h, y, field(s, y))
        y, dq = _moved(y, h, slopes, tableau.result)
        integrals = dq if integrals is None else integrals + dq
        done((i + 1) / (len(grid) - 1))
    assert integrals is not None
    return Solution(y, integrals, torch.full((len(y),), len(grid) - 1, device=y.device))


def _adaptive(
    field: Field, y: Tensor, grid: Sequence[float], solver: Solver, done: Callable[[float], None]
) -> Solution:
    start, end = grid[0], grid[-1]
    s = torch.full((len(y),), start, dtype=torch.float64, device=y.device)
    first = field(s, y)
    q = torch.zeros_like(first[1])
    h = math.copysign(1.0, end - start) * _first_step(y, first[0], solver, abs(end - start))
    steps = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    at_end, waiting = torch.zeros_like(s, dtype=torch.bool), torch.ones_like(s, dtype=torch.bool)
    watch = _Watch(y.device)
    for _ in range(solver.max_steps):
        last = h.abs() >= (end - s).abs()
        step = torch.where(last, end - s, h)
        slopes = _slopes(field, DOPRI5, s, step, y, first)
        new_y, dq = _moved(y, step, slopes, DOPRI5.result)
        new_q = q + dq
        error = _error(slopes, step, (y, q), (new_y, new_q), solver)
        accepted = waiting & (error <= 1)
        steps += waiting

        y = torch.where(per_sample(accepted, y), new_y, y)
        q = torch.where(accepted[:, None], new_q, q)
        first = (
            torch.where(per_sample(accepted, y), slopes[-1][0], first[0]),
            torch.where(accepted[:, None], slopes[-1][1], first[1]),
        )
        s = torch.where(accepted, torch.where(last, end, s + step), s)
        at_end = at_end | (accepted & last)
        # The usual controller (Hairer, Norsett & Wanner 1993, eq. II.4.13); an error that is not finite shrinks.
        factor = torch.nan_to_num(0.9 * error ** (-1 / 5), nan=0.2).clamp(0.2, 10.0)
        h = torch.where(waiting, step * factor, h)
        # A step too small to tell where it ends: a model whose output is not finite, or no smooth function, ends so.
        waiting = ~at_end & (h.abs() > 1e-12 * abs(end - start))
        share = torch.where(waiting, ((s - start) / (end - start)).clamp(max=0.999), 1.0).mean()
        if watch.saw(share, done):
            break
    short = int((~at_end).sum())
    if short:
        raise NotSolved(
            f"{short} of {len(y)} samples did not get to the end of the ODE in {solver.max_steps} steps with "
            f"rtol={solver.rtol} and atol={solver.atol}: allow larger errors, or take a solver of fixed steps"
        )
    return Solution(y, q, steps)


def _slopes(field: Field, tableau: Tableau, s: Tensor, h: Tensor, y: Tensor, first: Slope) -> list[Slope]:
    slopes = [first]
    for node, weights in zip(tableau.nodes[1:], tableau.weights[1:], strict=True):
        slopes.append(field(s + node * h, _moved(y, h, slopes, weights)[0]))
    return slopes


def _moved(y: Tensor, h: Tensor, slopes: list[Slope], weights: tuple[float, ...]) -> Slope:
    """y + h sum_j weights_j dy_j, and h sum_j weights_j dq_j."""
    dy, dq = _combined(slopes, weights)
    return y + per_sample(h, y).to(y.dtype) * dy, h[:, None] * dq


def _combined(slopes: list[Slope], weights: tuple[float, ...]) -> Slope:
    used = [(w, slope) for w, slope in zip(weights, slopes, strict=False) if w]
    (w, (dy, dq)), *rest = used
    dy, dq = w * dy, w * dq
    for w, slope in rest:
        dy, dq = dy + w * slope[0], dq + w * slope[1]
    return dy, dq


def _error(slopes: list[Slope], h: Tensor, old: Slope, new: Slope, solver: Solver) -> Tensor:
    """float64 [B]: the error of a step in units of what is allowed."""
    dy, dq = _combined(slopes, DOPRI5.error)
    bound = solver.atol + solver.rtol * torch.maximum(old[0].abs(), new[0].abs())
    of_y = h.abs() * _rms(dy / bound)
    numbers = dy[0].numel() if len(dy) else 1
    of_q = (h[:, None] * dq).abs() / (numbers * solver.atol + solver.rtol * torch.maximum(old[1].abs(), new[1].abs()))
    return torch.cat([of_y[:, None], of_q], 1).amax(1)


def _rms(x: Tensor) -> Tensor:
    return x.to(torch.float64).flatten(1).square().mean(1).sqrt()


def _first_step(y: Tensor, dy: Tensor, solver: Solver, way: float) -> Tensor:
    """A hundredth of what would move y by its own size, in units of what is allowed (Hairer, Norsett & Wanner 1993,
    section II.4); the controller finds the rest."""
    bound = solver.atol + solver.rtol * y.abs()
    step = 0.01 * _rms(y / bound) / _rms(dy / bound)
    return torch.nan_to_num(step, nan=1e-4).clamp(1e-6 * way, way)


class _Watch:
    """How far the batch is. A GPU is asked without waiting for it: what it says may be some steps old, in which it did
    nothing if all was done."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.asked = False
        self.share = torch.zeros((), dtype=torch.float64, pin_memory=self.event is not None)

    def saw(self, share: Tensor, done: Callable[[float], None]) -> bool:
        """Whether the share, a float64 of one number on the device, was 1 when last seen. done: told it."""
        if self.event is None:
            done(share.item())
            return share.item() == 1.0
        if self.asked and not self.event.query():
            return False
        seen = self.share.item() if self.asked else 0.0
        done(seen)
        self.share.copy_(share, non_blocking=True)
        self.event.record(torch.cuda.current_stream(share.device))
        self.asked = True
        return seen == 1.0

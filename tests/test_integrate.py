"""The Runge-Kutta solvers on equations with known answers: order, error against tolerance, and steps of each sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffkern.likelihood.integrate import DOPRI5, FIXED, NotSolved, Solution, Solver, Tableau, solve


def field(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dy/ds = y cos(s), so y = y_0 exp(sin s), beside dq/ds = y y_0' s-derivative: q = y - y_0."""
    dy = y * torch.cos(s)[:, None]
    return dy, dy.clone()


def followed(name: str, steps: int = 10, tolerance: float = 1e-6) -> Tensor:
    """The error of y, and of q, at s = 2 from y = 1 and y = -3 at s = 0."""
    y = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    grid = torch.linspace(0, 2, steps + 1, dtype=torch.float64).tolist()
    solution = solve(field, y, grid, Solver(name, steps, tolerance, tolerance))
    exact = y * math.exp(math.sin(2))
    assert solution.integrals.dtype == torch.float64
    return torch.maximum((solution.y - exact).abs().max(), (solution.integrals - (exact - y)).abs().max())


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("rk4", 4)])
def test_fixed_steps_have_their_order(name: str, order: int):
    errors = torch.stack([followed(name, steps) for steps in (20, 40, 80)])
    orders = torch.log2(errors[:-1] / errors[1:])
    assert (orders - order).abs().max() < 0.1, orders


@pytest.mark.parametrize(("tableau", "order"), [(FIXED["heun"], 2), (FIXED["rk4"], 4), (DOPRI5, 5)])
def test_the_tableaus_satisfy_the_conditions_of_their_order(tableau: Tableau, order: int):
    """sum_i b_i c_i^(k-1) = 1 / k up to the order, and row i of the weights sums to c_i (Hairer et al. 1993, II.1)."""
    for node, row in zip(tableau.nodes, tableau.weights, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    for k in range(1, order + 1):
        total = sum(b * c ** (k - 1) for b, c in zip(tableau.result, tableau.nodes, strict=True))
        assert total == pytest.approx(1 / k, abs=1e-14)
    embedded = [b - e for b, e in zip(tableau.result, tableau.error, strict=False)]
    for k in range(1, order if embedded else 1):  # the embedded method is one order lower
        total = sum(b * c ** (k - 1) for b, c in zip(embedded, tableau.nodes, strict=True))
        assert total == pytest.approx(1 / k, abs=1e-14)


def test_adaptive_steps_keep_to_the_tolerance():
    errors = [followed("dopri5", tolerance=10.0**-k).item() for k in (3, 6, 9)]
    # The tolerance is for a step; y grows by e, and the error that a step leaves with it.
    assert all(error < 10 * 10.0**-k for error, k in zip(errors, (3, 6, 9), strict=True)), errors
    assert errors[2] < errors[1] / 100 < errors[0] / 1e4


def test_the_integrals_are_kept_to_the_tolerance_too():
    """y stands still and would be right in one step; q is the integral of cos(20 s)."""

    def waving(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(y), torch.stack([torch.cos(20 * s), torch.ones_like(s)], dim=1)

    y = torch.ones(1, 1, dtype=torch.float64)
    solution = solve(waving, y, [0.0, 2.0], Solver("dopri5", 1, 1e-6, 1e-6))
    assert solution.integrals[0].tolist() == pytest.approx([math.sin(40) / 20, 2.0], abs=1e-5)


def test_a_sample_takes_the_steps_that_it_takes_alone():
    """y turns at a rate that each sample carries with it: an easy one, a stiff one and one that stands still."""

    def turning(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rate = y[:, 2]
        return torch.stack([-rate * y[:, 1], rate * y[:, 0], 0 * rate], dim=1), (rate * y[:, 0])[:, None]

    y = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 30.0], [1.0, 0.0, 0.0]], dtype=torch.float64)

    def run(y: Tensor) -> Solution:
        return solve(turning, y, [0.0, 3.0], Solver("dopri5", 1, 1e-6, 1e-6))

    together = run(y)

    rate = y[:, 2]
    exact = torch.stack([torch.cos(3 * rate), torch.sin(3 * rate)], dim=1)
    assert (together.y[:, :2] - exact).abs().max() < 1e-4
    assert (together.integrals[:, 0] - exact[:, 1]).abs().max() < 1e-4
    assert together.steps[1] > 10 * together.steps[0] > 10 * together.steps[2]
    for i in range(3):
        alone = run(y[i : i + 1])
        assert torch.equal(alone.y[0], together.y[i])
        assert torch.equal(alone.integrals[0], together.integrals[i])
        assert alone.steps[0] == together.steps[i]


def test_the_way_back_is_followed_too():
    y = torch.tensor([[2.0]], dtype=torch.float64)
    for solver in (Solver("dopri5", 1, 1e-9, 1e-9), Solver("rk4", 200, 1, 1)):
        grid = torch.linspace(2, 0, solver.steps + 1, dtype=torch.float64).tolist()
        solution = solve(field, y, grid, solver)
        assert solution.y.item() == pytest.approx(2 / math.exp(math.sin(2)), abs=1e-7)


def test_what_cannot_be_followed_is_said_and_ends_soon():
    y = torch.ones(3, 1, dtype=torch.float64)
    calls = 0

    def broken(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        dy = torch.where(torch.arange(3)[:, None] == 1, math.nan, 0 * y)
        return dy, dy

    with pytest.raises(NotSolved, match="1 of 3 samples did not get to the end of the ODE"):
        solve(broken, y, [0.0, 1.0], Solver("dopri5", 1, 1e-4, 1e-4))
    assert calls < 150
    with pytest.raises(NotSolved, match="led 1 of 3 samples to numbers that are not finite"):
        solve(broken, y, [0.0, 0.5, 1.0], Solver("rk4", 2, 1e-4, 1e-4))
    with pytest.raises(NotSolved, match=r"3 of 3 samples .* in 2 steps"):
        solve(field, y, [0.0, 1.0], Solver("dopri5", 1, 1e-12, 1e-12, max_steps=2))


@pytest.mark.gpu
def test_a_gpu_takes_the_steps_that_a_cpu_takes():
    y = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
    solver = Solver("dopri5", 1, 1e-7, 1e-7)
    shares: list[float] = []

    def watched(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        torch.cuda.set_sync_debug_mode("error")  # nothing in the loop waits for the device
        return field(s, y)

    def done(share: float) -> None:
        shares.append(share)
        if share == 1.0:
            torch.cuda.set_sync_debug_mode("default")

    here = solve(field, y, [0.0, 2.0], solver)
    try:
        there = solve(watched, y.cuda(), [0.0, 2.0], solver, done)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(here.steps, there.steps.cpu())
    torch.testing.assert_close(here.y, there.y.cpu(), rtol=1e-12, atol=1e-12)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0

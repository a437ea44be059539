"""Samplers on a Gaussian mixture, whose denoiser is exact: order of convergence, and moments of what is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from sampling import run_table
from torch import Tensor

from diffkern.likelihood import GaussianMixture
from diffkern.ops.randn import noise_keys, normal
from diffkern.samplers import Table, make_table
from diffkern.samplers.heun import edm
from diffkern.schedules import Schedule, flow
from diffkern.schedules import edm as edm_schedule

MIXTURE = GaussianMixture([0.3, 0.45, 0.25], [[1.0, 0.5], [-0.8, 0.9], [-0.2, -1.1]], [0.35**2, 0.25**2, 0.45**2])
KEYS = noise_keys(1, 16)
# Even in log(sigma / alpha) from -3 to 3, with an index 0 at the end and many divisors of the 960 steps to it.
LOG_RATIO = torch.linspace(-3.0, 3.0, 961, dtype=torch.float64)
EVEN = Schedule(torch.sigmoid(-2 * LOG_RATIO).sqrt(), torch.sigmoid(2 * LOG_RATIO).sqrt(), prediction="v")


def solve(y: Tensor, first: float, last: float, steps: int = 400) -> Tensor:
    """The probability-flow ODE of y = x / alpha over rho = sigma / alpha, dy / dlog(rho) = y - x_0, by RK4."""

    def slope(log_rho: float, y: Tensor) -> Tensor:
        alpha = (1 + math.exp(2 * log_rho)) ** -0.5
        return y - MIXTURE.posterior_mean(alpha * y, alpha, math.exp(log_rho) * alpha)

    h = (math.log(last) - math.log(first)) / steps
    for i in range(steps):
        u = math.log(first) + i * h
        k1 = slope(u, y)
        k2 = slope(u + h / 2, y + h / 2 * k1)
        k3 = slope(u + h / 2, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + h, y + h * k3))
    return y


def slope_of(errors: list[float], steps: list[int]) -> float:
    """The order: minus the slope of log(error) over log(steps), from the two ends."""
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


@pytest.fixture(scope="module", name="exact")
def make_exact() -> Tensor:
    """x / alpha at the end of EVEN."""
    first, last = math.exp(3), math.exp(-3)
    return solve(normal(KEYS, (2,), 0, torch.float64) * math.hypot(1, first), first, last)


UNFINISHED = {"lower_order_final": False}
ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_3m", {}, 2),  # not 3: see its docstring
    ("dpmpp_3m", {"third_order": True}, 3),
    # With its corrector UniPC-p is of order p + 1 (Zhao et al. 2023, theorem 3.1).
    ("unipc", {"order": 1, **UNFINISHED}, 2),
    ("unipc", {"order": 2, **UNFINISHED}, 3),
    ("unipc", {"order": 2, "solver_type": "bh1", **UNFINISHED}, 3),
    ("unipc", {"order": 3, **UNFINISHED}, 3.7),
    ("unipc", {"order": 2, "disable_corrector": tuple(range(200)), **UNFINISHED}, 2),
    ("plms", {}, 2),
    ("plms", {"average": "output"}, 1),  # of v: why the default averages epsilon
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 2}, 2),
    ("deis", {"order": 3}, 3),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=lambda v: str(v))
def test_order_of_convergence(name: str, options: dict, order: float, exact: Tensor):
    steps, errors = [20, 40, 80], []
    for n in steps:
        indices = [960 - 960 // n * i for i in range(n)]
        table = make_table(name, EVEN, n, spacing=indices, final="sigma_min", **options)
        scaled = name in ("euler", "heun")  # their state is x / alpha
        # From the same x as the reference, of unit variance.
        table = Table(table.rows, 1 / EVEN.alpha_t[-1].item() if scaled else 1.0)
        x = run_table(table, MIXTURE.model(EVEN), KEYS, (2,))[-1]
        errors.append(((x if scaled else x / EVEN.alpha_t[0]) - exact).abs().max().item())
    assert slope_of(errors, steps) == pytest.approx(order, abs=0.35), errors


def test_edm_converges_to_zero_noise_with_order_2():
    schedule = edm_schedule(1000, 0.002, 20.0)
    exact = solve(20.0 * normal(KEYS, (2,), 0, torch.float64), 20.0, 1e-7)
    steps, errors = [18, 36, 72], []
    for n in steps:
        x = run_table(edm(schedule, n), MIXTURE.model(schedule), KEYS, (2,))[-1]
        errors.append((x - exact).abs().max().item())
    assert slope_of(errors, steps) == pytest.approx(2, abs=0.35), errors


def test_flow_euler_converges_with_order_1():
    schedule = flow(1000)
    x = normal(KEYS, (2,), 0, torch.float64)
    # At sigma = 1 - 1e-9 the state is the noise, and x / alpha has unit variance over sigma / alpha.
    exact = solve(x * 1e9, 1e9, 1e-7)
    steps, errors = [20, 40, 80], []
    for n in steps:
        table = make_table("flow_euler", schedule, n, spacing="trailing")
        errors.append((run_table(table, MIXTURE.model(schedule), KEYS, (2,))[-1] - exact).abs().max().item())
    assert slope_of(errors, steps) == pytest.approx(1, abs=0.2), errors


MEAN = MIXTURE.weights @ MIXTURE.means
COVARIANCE = torch.einsum("k,ki,kj->ij", MIXTURE.weights, MIXTURE.means - MEAN, MIXTURE.means - MEAN)
COVARIANCE += MIXTURE.weights @ MIXTURE.variances * torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("ddpm", {}, 80),
        ("ddpm", {"variance": "fixed_large"}, 80),
        ("ddim", {"eta": 0.7}, 80),
        ("euler_a", {}, 80),
        ("dpmpp_2m_sde", {}, 60),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, 60),
        ("edm", {"s_churn": 30.0, "s_noise": 1.0}, 60),
    ],
    ids=str,
)
def test_moments(name: str, options: dict, steps: int):
    """Mean and covariance within five standard errors, and the 2% that steps of this size may make."""
    n = 4000
    schedule = edm_schedule(1000, 0.002, 40.0) if name == "edm" else EVEN
    if name != "edm":
        options = {**options, "spacing": [960 - 960 // steps * i for i in range(steps)]}
    x = run_table(make_table(name, schedule, steps, **options), MIXTURE.model(schedule), noise_keys(3, n), (2,))[-1]
    scale = COVARIANCE.diagonal().max().item()
    assert (x.mean(0) - MEAN).abs().max() < 5 * (scale / n) ** 0.5 + 0.02 * scale**0.5
    assert (x.T.cov() - COVARIANCE).abs().max() < 5 * scale * (2 / n) ** 0.5 + 0.02 * scale


def test_lcm_of_a_consistency_function():
    """With a model that jumps to the end of the ODE, one step gives the mixture's moments."""
    schedule = EVEN

    def consistency(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.alpha_t[int(t)].item(), schedule.sigma_t[int(t)].item()
        x0 = solve(x / alpha, sigma / alpha, 1e-4, 40)
        return -sigma * x0 + alpha * (x - alpha * x0) / sigma

    n = 2000
    x = run_table(make_table("lcm", schedule, 3), consistency, noise_keys(5, n), (2,))[-1]
    scale = COVARIANCE.diagonal().max().item()
    assert (x.mean(0) - MEAN).abs().max() < 5 * (scale / n) ** 0.5
    assert (x.T.cov() - COVARIANCE).abs().max() < 5 * scale * (2 / n) ** 0.5

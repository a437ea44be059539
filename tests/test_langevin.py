"""Langevin samplers: against their papers' algorithms as they stand there, and on mixtures whose weights they find."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from sampling import noise, run_table, toy_model
from torch import Tensor

import diffkern
from diffkern import make_table
from diffkern.likelihood import GaussianMixture
from diffkern.samplers import Table
from diffkern.schedules import Schedule, edm, linear

WIDE = edm(1000, 0.05, 20.0)


def edm_score(x: Tensor, sigma: float) -> Tensor:
    """(D(x) - x) / sigma^2 of the toy model."""
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5
    denoised = c_skip * x + c_out * toy_model(x / (sigma**2 + 0.25) ** 0.5, math.log(sigma) / 4)
    return (denoised - x) / sigma**2


def test_annealed_langevin_is_algorithm_1():
    """Song & Ermon 2019, with L levels, T steps and their epsilon."""
    L, T, epsilon = 5, 3, 3e-4
    sigmas = [20 * (0.05 / 20) ** (i / (L - 1)) for i in range(L)]
    x, draw = 20 * noise(0), 0
    for sigma in sigmas:
        step = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(T):
            x = x + step / 2 * edm_score(x, sigma) + step**0.5 * noise(draw := draw + 1)
    x = x + sigmas[-1] ** 2 * edm_score(x, sigmas[-1])

    snr = (epsilon / sigmas[-1] ** 2 / 4) ** 0.5
    ours = run_table(make_table("annealed_langevin", WIDE, L, langevin_steps=T, snr=snr), toy_model)[-1]
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


def test_predictor_corrector_is_algorithm_2():
    """Song et al. 2021, algorithm 2 with algorithm 4's step, norms replaced by their expectations; the last step is
    their code's, without noise."""
    N, M, r = 6, 2, 0.16
    sigmas = [*(float(p) for p in torch.linspace(20 ** (1 / 7), 0.05 ** (1 / 7), N, dtype=torch.float64) ** 7), 0.0]
    x, draw = 20 * noise(0), 0
    for s, t in pairwise(sigmas):
        x = x + (s**2 - t**2) * edm_score(x, s)
        if t > 0:
            x = x + (s**2 - t**2) ** 0.5 * noise(draw := draw + 1)
            epsilon = 2 * (r * t) ** 2
            for _ in range(M):
                x = x + epsilon * edm_score(x, t) + (2 * epsilon) ** 0.5 * noise(draw := draw + 1)

    ours = run_table(make_table("predictor_corrector", WIDE, N, langevin_steps=M, snr=r), toy_model)[-1]
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


def test_predictor_corrector_takes_the_ancestral_step_of_a_variance_preserving_schedule():
    """Song et al. 2021, eq. 4: x_{t-1} = (x_t + beta_t score) / sqrt(1 - beta_t) + sqrt(beta_t) z."""
    schedule = linear(6, beta_start=0.1, beta_end=0.5)
    betas = torch.linspace(0.1, 0.5, 6, dtype=torch.float64).tolist()
    x, draw = noise(0), 0
    for t in range(5, -1, -1):
        score = -toy_model(x, float(t)) / schedule.sigma_t[t]
        x = (x + betas[t] * score) / (1 - betas[t]) ** 0.5
        if t:
            x = x + betas[t] ** 0.5 * noise(draw := draw + 1)
            step = 2 * (0.1 * schedule.sigma_t[t - 1]) ** 2
            score = -toy_model(x, float(t - 1)) / schedule.sigma_t[t - 1]
            x = x + step * score + (2 * step) ** 0.5 * noise(draw := draw + 1)

    ours = run_table(make_table("predictor_corrector", schedule, 6, snr=0.1), toy_model)[-1]
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


# Song & Ermon 2019, section 3.2.2: Langevin dynamics at one level never learns the weights of modes so far apart.
FAR = GaussianMixture([0.2, 0.8], [[-5.0, -5.0], [5.0, 5.0]], [1.0, 0.5])
N = 2000
schedules = pytest.mark.parametrize("schedule", [WIDE, linear(1000, prediction="v")], ids=["edm", "vp"])


def assert_recovered(mixture: GaussianMixture, x: Tensor, bias: float, weight_bias: float = 0.0) -> None:
    """The weight of each mode, its mean and its variance, within four standard errors, weight_bias, and a share `bias`
    of the variance."""
    x = x.to(torch.float64)
    mode = mixture.responsibilities(x).argmax(1)  # the modes of FAR do not overlap
    for k, (weight, mean, variance) in enumerate(zip(mixture.weights, mixture.means, mixture.variances, strict=True)):
        own = x[mode == k]
        n = len(own)
        assert abs(n / len(x) - weight) < 4 * (weight * (1 - weight) / len(x)) ** 0.5 + weight_bias, (
            f"weight of mode {k}: {n}"
        )
        assert ((own.mean(0) - mean).abs() < 4 * (variance / n) ** 0.5).all(), f"mean of mode {k}"
        off = own.var(0) / variance - 1
        assert (off.abs() < 4 * (2 / n) ** 0.5 + bias).all(), f"variance of mode {k}: {off}"


def draw(table: Table, schedule: Schedule) -> Tensor:
    return diffkern.sample(FAR.model(schedule), table, N, shape=(2,), seed=1, batch_size=N, progress=False)


@schedules
def test_annealed_langevin_recovers_a_mixture(schedule: Schedule):
    table = make_table("annealed_langevin", schedule, 40)
    levels = math.log(table.rows[0].noise / table.rows[-2].noise)
    # Both biases are in its docstring. That of the weights is 0.02 here, measured with 10 000 samples.
    assert_recovered(FAR, draw(table, schedule), bias=1.5 * levels / (2 * 0.4**2 * 800), weight_bias=0.02)


@schedules
def test_predictor_corrector_recovers_a_mixture(schedule: Schedule):
    table = make_table("predictor_corrector", schedule, 100, spacing="karras")
    assert_recovered(FAR, draw(table, schedule), bias=0.05)  # of steps of this size


def test_langevin_at_one_level_gets_the_weights_wrong():
    """What the annealing is for; and the check above sees it."""
    annealed = make_table("annealed_langevin", WIDE, 20, langevin_steps=20, snr=0.4)
    one_level = list(annealed.rows[12 * 20 : 13 * 20]) * 10  # sigma = 0.45, below the modes' spread
    x = draw(Table(one_level, 5.0), WIDE)
    with pytest.raises(AssertionError, match="weight of mode 0"):
        assert_recovered(FAR, x, bias=math.inf, weight_bias=0.02)

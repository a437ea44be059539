"""The probability of an 8-bit value is bounded from below, by how much theory says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import schedules
from diffkern.likelihood import GaussianMixture, ode_log_likelihood
from diffkern.likelihood.dequantize import HALF_BIN, dequantize

SCHEDULE = schedules.linear(1000, beta_start=1e-6)  # whose least noise, 0.001, is small against half a bin, 0.0039
RATIO = (SCHEDULE.sigma_t[0] / SCHEDULE.alpha_t[0]).item()
# On two values of the 256, all but exactly: what a perfect model of 8-bit data has learnt.
VALUES = torch.tensor([[51.0], [153.0]], dtype=torch.float64) / 127.5 - 1
DISCRETE = GaussianMixture([0.25, 0.75], VALUES, [1e-8, 1e-8])
SMOOTH = GaussianMixture([0.4, 0.6], [[0.6], [-0.4]], [0.01, 0.04])


@pytest.mark.parametrize("kind", ["uniform", "variational"])
@pytest.mark.parametrize("ratio", [0.001, 0.004, 0.1])
def test_noise_stays_in_the_bin_and_its_density_is_known(kind: str, ratio: float):
    """E_q[1 / q] is the width of the bin, for any density q that is positive there alone."""
    n = 4096
    x = torch.full((n, 1), 0.25, dtype=torch.float64)
    noisy, log_q = dequantize(kind, x, ratio, diffkern.noise_keys(0, n), torch.zeros(n, dtype=torch.int64))
    u = (noisy - x).flatten()
    assert u.abs().max() <= HALF_BIN * (1 + 1e-12)
    if kind == "uniform" or ratio > 0.001:  # else 1 / q, which is large where no draw comes, has no useful mean
        inverse = torch.exp(-log_q)
        error = inverse.std() / n**0.5
        assert abs(inverse.mean() - 2 * HALF_BIN) <= 4 * error + 1e-12
    # The second moment of the normal that is cut off at +-b: r^2 (1 - 2 b phi(b) / mass), with b = half a bin / r.
    b = HALF_BIN / ratio
    mass, density = math.erf(b / 2**0.5), math.exp(-(b**2) / 2) / (2 * math.pi) ** 0.5
    square = HALF_BIN**2 / 3 if kind == "uniform" else ratio**2 * (1 - 2 * b * density / mass)
    assert abs((u**2).mean() - square) < 4 * (u**2).std() / n**0.5
    assert abs(u.mean()) < 4 * u.std() / n**0.5


def bound(mixture: GaussianMixture, x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The bound, its standard error, and the exact log-probability of the bin, of the density that the ODE has."""
    result = ode_log_likelihood(
        mixture.model(SCHEDULE), x, SCHEDULE, divergence="exact", dequantization=kind, repeats=24, rtol=1e-5, atol=1e-5,
        batch_size=200,
    )  # fmt: skip
    torch.testing.assert_close(-sum(result.terms.values()), result.log_p)
    spread = (mixture.variances + RATIO**2).sqrt()
    high, low = (torch.special.ndtr((x + s * HALF_BIN - mixture.means[:, 0]) / spread) for s in (1, -1))
    return result.log_p, result.stderr, (mixture.weights * (high - low)).sum(1).log()


def test_variational_dequantisation_is_tight_on_discrete_data_and_uniform_is_not():
    variational, stderr, exact = bound(DISCRETE, VALUES, "variational")
    assert (variational - exact).abs().max() < 2e-3
    assert stderr.max() < 3e-3
    uniform, stderr, exact = bound(DISCRETE, VALUES, "uniform")
    b = HALF_BIN / RATIO
    gap = b**2 / 6 + math.log(RATIO * (2 * math.pi) ** 0.5 / (2 * HALF_BIN))  # KL from uniform to that normal
    assert gap > 1
    assert ((exact - uniform - gap).abs() < 4 * stderr + 2e-3).all()


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_both_bound_the_probability_of_smooth_data(kind: str):
    x = torch.tensor([[10.0], [80.0], [200.0]], dtype=torch.float64) / 127.5 - 1
    log_p, stderr, exact = bound(SMOOTH, x, kind)
    assert (log_p < exact + 4 * stderr + 1e-3).all()
    if kind == "uniform":  # the density is all but the same over a bin
        assert (log_p > exact - 4 * stderr - 2e-3).all()

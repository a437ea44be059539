"""The exact oracles against quadrature and against each other: identities, to 1e-10 in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffkern import noise_keys, schedules
from diffkern.layout import per_sample
from diffkern.likelihood import Denoiser, GaussianMixture
from diffkern.ops.randn import normal

WEIGHTS = [0.3, 0.45, 0.25]
MEANS = [[1.0, 0.5], [-0.8, 0.9], [-0.2, -1.1]]
COVARIANCES = [[[0.2, 0.1], [0.1, 0.15]], [[0.12, -0.05], [-0.05, 0.3]], [[0.1, 0.0], [0.0, 0.1]]]
MIXTURES = {
    "isotropic": GaussianMixture(WEIGHTS, MEANS, [0.12, 0.06, 0.2]),
    "diagonal": GaussianMixture(WEIGHTS, MEANS, [[0.12, 0.2], [0.06, 0.3], [0.2, 0.1]]),
    "full": GaussianMixture(WEIGHTS, MEANS, COVARIANCES),
}
LEVELS = [(1.0, 0.0), (0.8, 0.6), (1.0, 2.0), (0.3, 0.7), (0.0, 1.0)]
mixtures = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def draws(n: int, *shape: int) -> Tensor:
    return normal(noise_keys(3, n), shape, 0, torch.float64)


def lattice(reach: float, count: int) -> tuple[Tensor, float]:
    """Points [count^2, 2] of a square, and the area of each: the trapezoid rule is exact for what vanishes at its edge
    and is smooth, up to rounding."""
    side = torch.linspace(-reach, reach, count, dtype=torch.float64)
    return torch.cartesian_prod(side, side), (2 * reach / (count - 1)) ** 2


@mixtures
def test_a_mixture_and_its_responsibilities_integrate(mixture: GaussianMixture):
    for alpha, sigma in LEVELS:
        x, area = lattice(5 + 8 * sigma, 100)
        p = mixture.log_prob(x, alpha, sigma).exp()
        exactly(p.sum() * area, torch.tensor(1.0, dtype=torch.float64))
        exactly(p @ mixture.responsibilities(x, alpha, sigma) * area, mixture.weights)


@mixtures
def test_what_the_noise_makes_of_a_mixture_is_an_integral_over_x0(mixture: GaussianMixture):
    """p(x_t) = int p(x_0) N(x_t; alpha x_0, sigma^2) dx_0, and E[x_0 | x_t] the mean of x_0 under the integrand."""
    x0, area = lattice(5.0, 140)
    log_p = mixture.log_prob(x0)
    for alpha, sigma in LEVELS[1:]:
        x = 1.5 * draws(4, 2)
        square = ((x[:, None] - alpha * x0) ** 2).sum(-1) / sigma**2
        joint = torch.exp(log_p - 0.5 * square) / (2 * math.pi * sigma**2) * area
        exactly(mixture.log_prob(x, alpha, sigma), joint.sum(1).log())
        exactly(mixture.posterior_mean(x, alpha, sigma), joint @ x0 / joint.sum(1, keepdim=True))


@mixtures
def test_the_score_is_the_gradient_and_gives_the_posterior_mean(mixture: GaussianMixture):
    """E[x_0 | x_t] = (x_t + sigma^2 score) / alpha (Tweedie: Efron 2011, eq. 1.4), a level for each sample."""
    alpha, sigma = torch.tensor(LEVELS, dtype=torch.float64).T
    x = 2 * draws(len(LEVELS), 2)
    (gradient,) = torch.autograd.grad(mixture.log_prob(x.requires_grad_(), alpha, sigma).sum(), x)
    x = x.detach()
    score = mixture.score(x, alpha, sigma)
    exactly(score, gradient)
    denoised = per_sample(alpha, x) * mixture.posterior_mean(x, alpha, sigma)
    exactly(denoised, x + per_sample(sigma**2, x) * score)


SCHEDULES = {
    "epsilon": schedules.linear(100),
    "v, zero terminal SNR": schedules.rescale_zero_snr(schedules.cosine(100, prediction="v")),
    "x0": schedules.scaled_linear(50, prediction="x0"),
    "flow": schedules.flow(64, shift=3.0),
    "edm": schedules.edm(32),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_model_of_a_mixture_has_its_score_at_every_noise_level(schedule: schedules.Schedule):
    mixture = MIXTURES["full"]
    denoiser = Denoiser.of(mixture.model(schedule), schedule)
    first, last = denoiser.angles
    between = denoiser.at_angle(torch.linspace(first, last, 23, dtype=torch.float64)[1:-1])
    own = denoiser.at(torch.arange(len(schedule)))
    for levels in (between, own):
        x = draws(len(levels.alpha), 1, 2)
        x = per_sample(levels.radius, x) * x
        log_p = mixture.log_prob(x.requires_grad_(), levels.alpha, levels.sigma)
        (gradient,) = torch.autograd.grad(log_p.sum(), x)
        x = x.detach()
        x0, epsilon = denoiser.predict(x, levels)
        torch.testing.assert_close(-epsilon, per_sample(levels.sigma, x) * gradient, rtol=1e-9, atol=1e-9)
        exactly(per_sample(levels.alpha, x) * x0 + per_sample(levels.sigma, x) * epsilon, x)


@mixtures
def test_draws_of_a_mixture_have_its_moments(mixture: GaussianMixture):
    n = 20_000
    x = mixture.sample(noise_keys(0, n))
    covariances = mixture.variances
    if covariances.dim() < 3:
        covariances = torch.diag_embed(covariances.reshape(3, -1).expand(3, 2))
    outer = mixture.means[:, :, None] * mixture.means[:, None]
    second = (mixture.weights[:, None, None] * (covariances + outer)).sum(0)
    for sampled, expected in ((x, mixture.weights @ mixture.means), (x[:, :, None] * x[:, None], second)):
        assert ((sampled.mean(0) - expected).abs() < 4 * sampled.std(0) / n**0.5).all()
    # The mean of responsibilities over p(x) is the weights.
    shares = mixture.responsibilities(x)
    assert ((shares.mean(0) - mixture.weights).abs() < 4 * shares.std(0) / n**0.5).all()
    assert torch.equal(mixture.sample(noise_keys(0, [17])), x[17:18])


@pytest.mark.parametrize(
    ("weights", "means", "variances", "message"),
    [
        ([1.0, math.nan], [[0.0], [1.0]], [1.0, 1.0], "weights of a mixture must be finite"),
        ([1.0, -1.0], [[0.0], [1.0]], [1.0, 1.0], "must be 2 positive numbers"),
        ([1.0], [[0.0], [1.0]], [1.0, 1.0], "weights of a mixture of 2 components"),
        ([1.0], [0.0], [1.0], r"shape \[K, D\], not \[1\]"),
        ([1.0], [[0.0, 0.0]], [1.0, 1.0], r"must be of shape \[1\], \[1, 2\] or \[1, 2, 2\], not \[2\]"),
        ([1.0], [[0.0]], [0.0], "must be positive"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]], "positive definite"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]], "symmetric"),
    ],
)
def test_mixtures_that_are_none_are_refused(weights, means, variances, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, variances)


def test_samples_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"2 numbers in a sample, not \[4, 3\]"):
        MIXTURES["full"].log_prob(torch.zeros(4, 3))

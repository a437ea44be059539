"""The exact oracles against quadrature and against each other: identities, to 1e-10 in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffkern import noise_keys, schedules
from diffkern.layout import per_sample
from diffkern.likelihood import Denoiser, GaussianMixture, LinearGaussian, LinearGaussianChain
from diffkern.likelihood.exact import Gaussian
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
        exactly(-epsilon, per_sample(levels.sigma, x) * gradient)
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


PCA = LinearGaussian([[0.9, 0.3], [-0.4, 0.8], [0.2, -0.5]], [0.1, -0.2, 0.3], 0.4)
CHAINS = {
    "one level": PCA,
    "two levels": LinearGaussianChain(
        [([[0.9], [-0.4]], [0.1, -0.2], [0.4, 0.7]), ([[0.5, -1.1]], [0.3], 0.5)],
    ),
    "three levels": LinearGaussianChain([([[0.9]], [0.1], 0.4), ([[0.7]], [0.2], 0.3), ([[-1.2]], [0.4], 0.5)]),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def sizes(chain: LinearGaussianChain) -> list[int]:
    return [len(level.mean) for level in chain.marginals]


def some_x(chain: LinearGaussianChain, n: int = 2) -> Tensor:
    return draws(n, sizes(chain)[0])


def some_q(chain: LinearGaussianChain, n: int) -> Gaussian:
    """Far from any posterior, and correlated."""
    d = sum(sizes(chain)[1:])
    root = draws(d, d + 1)
    return Gaussian(draws(n, d), root @ root.mT)


@chains
def test_log_p_and_the_posterior_of_a_chain_are_integrals_over_its_latents(chain: LinearGaussianChain):
    d, x = sum(sizes(chain)[1:]), some_x(chain)
    side = torch.linspace(-9, 9, 73, dtype=torch.float64)
    z = torch.cartesian_prod(*[side] * d)
    latents, volume = z.split(sizes(chain)[1:], dim=1), 0.25**d
    posterior = chain.posterior(x)
    for i in range(len(x)):
        joint = chain.log_joint(x[i : i + 1], *latents).exp() * volume
        exactly(chain.log_prob(x[i : i + 1]), joint.sum()[None].log())
        mean = joint @ z / joint.sum()
        exactly(posterior.mean[i], mean)
        exactly(posterior.covariance, (z - mean).mT @ (joint[:, None] * (z - mean)) / joint.sum())


@chains
def test_the_joint_over_the_posterior_is_constant_in_the_latents(chain: LinearGaussianChain):
    """p(x, z) / p(z | x) = p(x) whatever z, with p(z | x) whole or by the chain rule, p(z_1 | x) p(z_2 | z_1) ..."""
    n = 5
    x, z = some_x(chain, 1).expand(n, -1), 2 * draws(n, sum(sizes(chain)[1:]))
    latents = z.split(sizes(chain)[1:], dim=1)
    log_p = chain.log_prob(x)
    exactly(chain.log_joint(x, *latents) - chain.posterior(x).log_prob(z), log_p)
    by_level = torch.zeros(n, dtype=torch.float64)
    for t, (low, high) in enumerate(zip((x, *latents), latents, strict=False), 1):
        by_level += chain.above(t, low).log_prob(high)
    exactly(chain.log_joint(x, *latents) - by_level, log_p)


@chains
def test_the_elbo_is_below_log_p_by_the_divergence_of_q_from_the_posterior(chain: LinearGaussianChain):
    x = some_x(chain)
    q, posterior, log_p = some_q(chain, len(x)), chain.posterior(x), chain.log_prob(x)
    bound = chain.elbo(x, q)
    assert (bound < log_p - 0.1).all()
    exactly(log_p - bound, q.kl(posterior))
    exactly(chain.elbo(x, posterior), log_p)
    # The expectation of the quadratic log p(x, z) - log q(z) is its mean over q's sigma points.
    d = len(q.covariance)
    root = d**0.5 * torch.linalg.cholesky(q.covariance)
    points = torch.cat([root.mT, -root.mT])[:, None] + q.mean
    ratio = [chain.log_joint(x, *z.split(sizes(chain)[1:], dim=1)) - q.log_prob(z) for z in points]
    exactly(bound, torch.stack(ratio).mean(0))


@chains
def test_draws_of_a_chain_have_its_moments(chain: LinearGaussianChain):
    n = 20_000
    for level, states in zip(chain.marginals, chain.sample(noise_keys(1, n)), strict=True):
        off = states - level.mean
        assert (off.mean(0).abs() < 4 * (level.covariance.diagonal() / n) ** 0.5).all()
        outer = off[:, :, None] * off[:, None]
        assert ((outer.mean(0) - level.covariance).abs() < 4 * outer.std(0) / n**0.5).all()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "at least one step"),
        ([([[math.inf]], [0.0], 1.0)], "W_1 must be finite"),
        ([([[1.0]], [0.0], 0.0)], "variance_1 must be positive"),
        ([([[1.0]], [0.0, 1.0], 1.0)], "step 1 of a chain needs"),
        ([([[1.0]], [0.0], 1.0), ([[1.0], [2.0]], [0.0, 0.0], 1.0)], "W_2 makes 2 numbers, but W_1 takes 1"),
    ],
)
def test_chains_that_are_none_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        LinearGaussianChain(steps)

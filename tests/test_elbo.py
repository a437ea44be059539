"""The evidence lower bound and the importance-weighted one, on linear-Gaussian chains, whose log p(x) and posterior are
known: below log p(x) by what theory says, and equal to it at the exact posterior."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern import Draw, noise_keys
from diffkern.likelihood import Terms, elbo, iwae
from diffkern.ops.randn import normal


def made(*shape: int, draw: int = 0) -> Tensor:
    return normal(noise_keys(11, 1), shape, draw, torch.float64)[0]


class Gaussian:
    """N(mean, chol chol^T): mean [B, d] or [d], chol [d, d]."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean, covariance
        self.chol = torch.linalg.cholesky(covariance)

    def log_prob(self, z: Tensor) -> Tensor:
        whitened = (z - self.mean) @ torch.linalg.inv(self.chol).mT
        return -0.5 * (whitened**2 + math.log(2 * math.pi)).sum(1) - self.chol.diagonal().log().sum()

    def kl(self, other: Gaussian) -> Tensor:
        precision = torch.linalg.inv(other.covariance)
        off = self.mean - other.mean
        both = (precision @ self.covariance).trace() - len(self.chol)
        logdet = 2 * (other.chol.diagonal() / self.chol.diagonal()).log().sum()
        return 0.5 * ((off @ precision * off).sum(1) + both + logdet)


class Chain:
    """z_T ~ N(0, I), z_t-1 = W_t z_t + b_t + 0.7 epsilon, z_0 = x: sizes are those of x, z_1, ..., z_T. Its encoder
    q(z_t | z_t-1) is the exact posterior, or with `wrong` one that is off and too narrow by as much."""

    def __init__(self, *sizes: int, wrong: float = 0.0) -> None:
        self.wrong = wrong
        self.down = [(made(a, b, draw=t), made(a, draw=50 + t)) for t, (a, b) in enumerate(pairwise(sizes))]
        self.marginals = [Gaussian(torch.zeros(sizes[-1]).double(), torch.eye(sizes[-1]).double())]
        for w, b in reversed(self.down):
            above = self.marginals[0]
            covariance = w @ above.covariance @ w.mT + 0.49 * torch.eye(len(b)).double()
            self.marginals.insert(0, Gaussian(w @ above.mean + b, covariance))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.marginals[0].log_prob(x)

    def q(self, t: int, lower: Tensor) -> Gaussian:
        """q(z_t | z_t-1) by Bayes' rule."""
        (w, b), prior = self.down[t - 1], self.marginals[t]
        covariance = torch.linalg.inv(torch.linalg.inv(prior.covariance) + w.mT @ w / 0.49)
        mean = (torch.linalg.inv(prior.covariance) @ prior.mean + (lower - b) @ w / 0.49) @ covariance
        return Gaussian(mean + self.wrong, covariance / (1 + self.wrong))

    def p(self, t: int, above: Tensor) -> Gaussian:
        """p(z_t | z_t+1), of x for t = 0."""
        w, b = self.down[t]
        return Gaussian(above @ w.mT + b, 0.49 * torch.eye(len(b)).double())

    def __call__(self, x: Tensor, keys: Tensor) -> Terms:
        latents, posteriors = [x], []
        for t in range(1, len(self.marginals)):
            posteriors.append(q := self.q(t, latents[-1]))
            latents.append(q.mean + normal(keys, q.mean.shape[1:], Draw.VAE + t, torch.float64) @ q.chol.mT)
        priors = [self.p(t, latents[t + 1]) for t in range(1, len(posteriors))] + [self.marginals[-1]]
        levels = zip(posteriors, priors, latents[1:], strict=True)
        ratio = torch.stack([q.log_prob(z) - p.log_prob(z) for q, p, z in levels], 1)
        kl = torch.cat([ratio[:, :-1], posteriors[-1].kl(priors[-1])[:, None]], 1)
        return Terms(-self.p(0, latents[1]).log_prob(x), ratio, kl)


X = made(64, 4, draw=99) * 2


@pytest.mark.parametrize("sizes", [(4, 3), (4, 3, 2, 2)])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_exact_posterior_gives_log_p_with_any_number_of_draws(sizes: tuple[int, ...], k: int):
    chain = Chain(*sizes)
    bound = iwae(chain, X, k)
    torch.testing.assert_close(bound.log_p, chain.log_prob(X), rtol=0, atol=1e-10)
    assert math.isnan(bound.stderr[0]) if k == 1 else (bound.stderr < 1e-10).all()
    assert (bound.method, bound.dims) == ("iwae", 4)


def test_the_elbo_of_a_wrong_posterior_is_below_log_p_by_the_kl_between_them():
    chain = Chain(4, 3, wrong=0.5)
    gap = chain.q(1, X).kl(Chain(4, 3).q(1, X))

    bound = elbo(chain, X, samples=200)

    assert gap.min() > 0.5
    z = (bound.log_p - (chain.log_prob(X) - gap)) / bound.stderr
    assert z.abs().max() < 4  # of 64 of them
    assert 0.7 < z.square().mean().sqrt() < 1.3  # the error bars are right


@pytest.mark.parametrize("sizes", [(4, 3), (4, 3, 2)])
def test_the_bound_rises_with_k_and_stays_below_log_p(sizes: tuple[int, ...]):
    chain = Chain(*sizes, wrong=0.3)
    x = X.repeat(12, 1)  # with noise of their own, so that a mean gap has an error bar
    bounds = [elbo(chain, x, samples=16).log_p, *(iwae(chain, x, k, seed=k, batch_size=8192).log_p for k in (2, 8, 64))]
    gaps = [chain.log_prob(x) - bound for bound in bounds]
    for gap, next_gap in pairwise(gaps):
        fall = gap - next_gap
        assert fall.mean() > 3 * fall.std() / len(x) ** 0.5
    assert gaps[-1].mean() > -3 * gaps[-1].std() / len(x) ** 0.5
    assert gaps[-1].mean() < 0.2 * gaps[0].mean()


def test_the_terms_of_each_level_sum_to_the_elbo():
    chain = Chain(4, 3, 2, wrong=0.5)
    bound = elbo(chain, X, samples=50)
    terms = bound.terms
    assert {name: list(term.shape) for name, term in terms.items()} == {"reconstruction": [64], "kl": [64, 2]}
    torch.testing.assert_close(bound.log_p, -terms["reconstruction"] - terms["kl"].sum(1), rtol=0, atol=1e-12)
    # Of a single level every number is known.
    chain = Chain(4, 3, wrong=0.5)
    kl = elbo(chain, X, samples=2).terms["kl"][:, 0]
    torch.testing.assert_close(kl, chain.q(1, X).kl(chain.marginals[1]), rtol=0, atol=1e-12)


def test_error_bars_of_the_importance_weighted_bound_are_its_spread():
    chain = Chain(4, 3, wrong=0.3)
    bound = iwae(chain, X[:1].expand(500, 4), 64, batch_size=8192)
    spread = bound.log_p.std()
    assert abs(bound.stderr.mean() / spread - 1) < 0.15  # a spread of 500 is known within 3 %, the rest is the method's


@pytest.mark.parametrize("score", [partial(elbo, samples=5), partial(iwae, k=5)])
def test_an_image_has_the_same_bound_in_any_batch(score: Any):
    chain = Chain(4, 3, 2, wrong=0.5)
    whole = score(chain, X, seed=3)
    part = score(chain, X[[9, 2]], seed=3, sample_ids=[9, 2], batch_size=3)
    torch.testing.assert_close(part.log_p, whole.log_p[[9, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(part.stderr, whole.stderr[[9, 2]], rtol=0, atol=1e-12)
    assert not torch.equal(score(chain, X, seed=4).log_p, whole.log_p)


def test_batches_hold_draws_of_many_images_and_no_two_share_noise():
    seen: list[Tensor] = []

    def model(x: Tensor, keys: Tensor) -> Terms:
        seen.append(keys)
        return Terms(x.sum(1), torch.zeros(len(x), 1), torch.zeros(len(x), 1))

    assert iwae(model, X[:6], 3, batch_size=8).log_p.tolist() == pytest.approx((-X[:6].sum(1)).tolist(), abs=1e-12)
    assert [len(keys) for keys in seen] == [8, 8, 2]
    keys = torch.cat(seen)
    assert len(keys.unique(dim=0)) == 18
    seen.clear()
    iwae(model, X[:6], 2)
    assert torch.equal(torch.cat(seen).view(6, 2, 2), keys.view(6, 3, 2)[:, :2])  # the first draws are the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X * math.nan}, "x has numbers that are not finite"),
        ({"x": X.long()}, "x must be a floating-point tensor"),
        ({"samples": 0}, "samples must be > 0, not 0"),
        ({"batch_size": 0}, "batch_size must be > 0, not 0"),
        ({"sample_ids": [1, 2]}, "there are 64 samples but 2 sample_ids"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        elbo(Chain(4, 3), **{"x": X, **arguments})
    with pytest.raises(ValueError, match="k must be > 0, not -1"):
        iwae(Chain(4, 3), X, -1)

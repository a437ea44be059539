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
from diffkern.likelihood import LinearGaussianChain, Terms, elbo, iwae
from diffkern.likelihood.exact import Gaussian
from diffkern.ops.randn import normal


def made(*shape: int, draw: int = 0) -> Tensor:
    return normal(noise_keys(11, 1), shape, draw, torch.float64)[0]


class Inferred(LinearGaussianChain):
    """A chain of levels of the given sizes, x first, with an encoder q(z_t | z_t-1): the exact posterior, but off and
    too narrow by `wrong`."""

    def __init__(self, *sizes: int, wrong: float = 0.0) -> None:
        self.wrong = wrong
        super().__init__([(made(a, b, draw=t), made(a, draw=9 + t), 0.5) for t, (a, b) in enumerate(pairwise(sizes))])

    def q(self, t: int, z: Tensor) -> Gaussian:
        mean, covariance = self.above(t, z)
        return Gaussian(mean + self.wrong, covariance / (1 + self.wrong))

    def __call__(self, x: Tensor, keys: Tensor) -> Terms:
        latents, posteriors = [x], []
        for t in range(1, len(self.marginals)):
            posteriors.append(self.q(t, latents[-1]))
            latents.append(posteriors[-1].sample(keys, Draw.VAE + t))
        priors = [self.below(t, latents[t]) for t in range(2, len(latents))] + [self.marginals[-1]]
        levels = zip(posteriors, priors, latents[1:], strict=True)
        ratio = torch.stack([q.log_prob(z) - p.log_prob(z) for q, p, z in levels], 1)
        kl = torch.cat([ratio[:, :-1], posteriors[-1].kl(priors[-1])[:, None]], 1)
        return Terms(-self.below(1, latents[1]).log_prob(x), ratio, kl)


X = made(64, 4, draw=99) * 2


@pytest.mark.parametrize("sizes", [(4, 3), (4, 3, 2, 2)])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_exact_posterior_gives_log_p_with_any_number_of_draws(sizes: tuple[int, ...], k: int):
    chain = Inferred(*sizes)
    bound = iwae(chain, X, k)
    torch.testing.assert_close(bound.log_p, chain.log_prob(X), rtol=0, atol=1e-10)
    assert math.isnan(bound.stderr[0]) if k == 1 else (bound.stderr < 1e-10).all()
    assert (bound.method, bound.dims) == ("iwae", 4)


def test_the_elbo_of_a_wrong_posterior_is_below_log_p_by_the_kl_between_them():
    chain = Inferred(4, 3, wrong=0.5)
    gap = chain.q(1, X).kl(Inferred(4, 3).q(1, X))

    bound = elbo(chain, X, samples=200)

    assert gap.min() > 0.5
    z = (bound.log_p - (chain.log_prob(X) - gap)) / bound.stderr
    assert z.abs().max() < 4  # of 64 of them
    assert 0.7 < z.square().mean().sqrt() < 1.3  # the error bars are right
    again = elbo(chain, X, samples=200, seed=1)
    said = (bound.terms_stderr["reconstruction"].square() + again.terms_stderr["reconstruction"].square()).sqrt()
    z = (bound.terms["reconstruction"] - again.terms["reconstruction"]) / said
    assert 0.7 < z.square().mean().sqrt() < 1.3
    assert bound.terms_stderr["kl"].max() < 1e-12  # of one level, in closed form


@pytest.mark.parametrize("sizes", [(4, 3), (4, 3, 2)])
def test_the_bound_rises_with_k_and_stays_below_log_p(sizes: tuple[int, ...]):
    chain = Inferred(*sizes, wrong=0.3)
    x = X.repeat(12, 1)  # with noise of their own, so that a mean gap has an error bar
    bounds = [elbo(chain, x, samples=16).log_p, *(iwae(chain, x, k, seed=k, batch_size=8192).log_p for k in (2, 8, 64))]
    gaps = [chain.log_prob(x) - bound for bound in bounds]
    for gap, next_gap in pairwise(gaps):
        fall = gap - next_gap
        assert fall.mean() > 3 * fall.std() / len(x) ** 0.5
    assert gaps[-1].mean() > -3 * gaps[-1].std() / len(x) ** 0.5
    assert gaps[-1].mean() < 0.2 * gaps[0].mean()


def test_the_terms_of_each_level_sum_to_the_elbo():
    chain = Inferred(4, 3, 2, wrong=0.5)
    bound = elbo(chain, X, samples=50)
    terms = bound.terms
    assert {name: list(term.shape) for name, term in terms.items()} == {"reconstruction": [64], "kl": [64, 2]}
    torch.testing.assert_close(bound.log_p, -terms["reconstruction"] - terms["kl"].sum(1), rtol=0, atol=1e-12)
    # Of a single level every number is known.
    chain = Inferred(4, 3, wrong=0.5)
    kl = elbo(chain, X, samples=2).terms["kl"][:, 0]
    torch.testing.assert_close(kl, chain.q(1, X).kl(chain.marginals[1]), rtol=0, atol=1e-12)


def test_error_bars_of_the_importance_weighted_bound_are_its_spread():
    chain = Inferred(4, 3, wrong=0.3)
    bound = iwae(chain, X[:1].expand(500, 4), 64, batch_size=8192)
    spread = bound.log_p.std()
    assert abs(bound.stderr.mean() / spread - 1) < 0.15  # a spread of 500 is known within 3 %, the rest is the method's


@pytest.mark.parametrize("score", [partial(elbo, samples=5), partial(iwae, k=5)])
def test_an_image_has_the_same_bound_in_any_batch(score: Any):
    chain = Inferred(4, 3, 2, wrong=0.5)
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
        elbo(Inferred(4, 3), **{"x": X, **arguments})
    with pytest.raises(ValueError, match="k must be > 0, not -1"):
        iwae(Inferred(4, 3), X, -1)

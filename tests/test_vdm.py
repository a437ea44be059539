"""The continuous-time bound: against closed forms, exact log p(x), the discrete bound, and the spread of many seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern import noise_keys, schedules
from diffkern.likelihood import GaussianMixture, Likelihood, vdm, vlb

MIXTURE = GaussianMixture([0.3, 0.7], [[-0.5, 0.2], [0.4, -0.1]], [0.05, 0.02])
MEAN, SPREAD = 0.3, 0.4
GAUSSIAN = GaussianMixture([1.0], [[MEAN, MEAN]], [SPREAD**2])
SCHEDULES = {
    "vp, epsilon": schedules.linear(1000),
    "vp, v, zero terminal SNR": schedules.rescale_zero_snr(schedules.cosine(200, prediction="v")),
    "flow": schedules.flow(200),
    "edm": schedules.edm(100, sigma_min=0.01),
}


def copies(mixture: GaussianMixture, x: Tensor, name: str, n: int, **options: Any) -> Likelihood:
    """n estimates for each of x, with independent noise."""
    schedule = SCHEDULES[name]
    options = {"decoder": "gaussian", "variance": "fixed_large", "batch_size": 20000, **options}
    return vdm(mixture.model(schedule), x.repeat(n, 1), schedule, **options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_integral_is_that_of_a_gaussian(name: str):
    schedule, x = SCHEDULES[name], torch.tensor([[0.1, 0.9], [-0.4, 0.3]], dtype=torch.float64)
    result = copies(GAUSSIAN, x, name, 500, points=20)
    # With S = SNR and r = variance of the data: x_0 - x_0_hat = ((x_0 - mean) - r sqrt(S) epsilon) / (1 + r S), and the
    # integral of its mean square over dS has an antiderivative
    first, last = ((schedule.alpha_t / schedule.sigma_t)[[0, -1]] ** 2).tolist()
    r = SPREAD**2

    def antiderivative(S: float) -> Tensor:
        off = (x - MEAN).square().sum(1)
        return -off / (r * (1 + r * S)) + 2 * (math.log1p(r * S) + 1 / (1 + r * S))

    expected = (antiderivative(first) - antiderivative(last)) / 2
    found = result.terms["diffusion"].sum(1).reshape(-1, 2)
    stderr = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4.5 * stderr).all()
    assert (stderr < 0.02 * expected).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_log_p_but_for_what_its_ends_cost(name: str):
    schedule, x = SCHEDULES[name], MIXTURE.sample(noise_keys(5, 4))
    result = copies(MIXTURE, x, name, 800, points=12)
    log_p = result.log_p.reshape(-1, 4)
    stderr = log_p.std(0) / len(log_p) ** 0.5
    gap = MIXTURE.log_prob(x) - log_p.mean(0)
    assert (gap > -4 * stderr).all()
    # The prior's gap is its KL at most; the decoder's, at the first level, is of the size of sigma_0^2 against the
    # narrowest variance, 0.02, in each of 2 dimensions.
    ends = result.terms["prior"].max() + 2 * schedule.sigma_t[0] ** 2 / 0.02
    assert gap.mean() < ends + 4 * stderr.norm() / 4


def test_it_is_above_the_bound_of_finitely_many_steps():
    schedule, x = schedules.edm(20), MIXTURE.sample(noise_keys(5, 50))
    options: dict[str, Any] = {"decoder": "gaussian", "variance": "fixed_large", "batch_size": 4000}
    discrete = vlb(MIXTURE.model(schedule), x, schedule, draws=4, **options)
    continuous = vdm(MIXTURE.model(schedule), x, schedule, **options)
    difference = continuous.log_p - discrete.log_p
    assert difference.mean() > 4 * difference.std() / 50**0.5
    torch.testing.assert_close(continuous.terms["prior"], discrete.terms["prior"])


def test_a_wrong_denoiser_has_a_worse_bound():
    schedule, x = SCHEDULES["flow"], MIXTURE.sample(noise_keys(5, 64))
    right, wrong = MIXTURE.model(schedule), GaussianMixture([1.0], [[0.1, 0.0]], [0.2]).model(schedule)
    better, worse = (vdm(m, x, schedule, decoder="gaussian", batch_size=4000) for m in (right, wrong))
    difference = better.log_p - worse.log_p
    assert difference.mean() > 4 * difference.std() / 8


@pytest.mark.parametrize("options", [{"points": 8}, {"points": 24}, {"points": 8, "draws": 3}], ids=str)
def test_the_error_bars_are_true(options: dict[str, int]):
    x = MIXTURE.sample(noise_keys(5, 6))
    result = copies(MIXTURE, x, "flow", 250, **options)
    spread = result.log_p.reshape(250, 6).var(0).mean().sqrt()
    assert 0.85 < result.stderr.square().mean().sqrt() / spread < 1.2  # the spread of 6 x 250 is known to 2 %
    for name in ("decoder", "diffusion"):
        spread = result.terms[name].reshape(250, 6, -1).var(0).sum(1).mean().sqrt()
        said = result.terms_stderr[name].square().reshape(1500, -1).sum(1).mean().sqrt()
        assert 0.8 < said / spread < 1.25, name  # as above, of a part of the sum


def test_a_sample_is_the_same_alone_and_in_any_batch():
    schedule, x = SCHEDULES["vp, epsilon"], MIXTURE.sample(noise_keys(5, 5))

    def model(x_t: Tensor, t: Tensor) -> Tensor:  # of elements: a matrix product may depend on the batch
        return torch.tanh(x_t) * torch.cos(t)[:, None]

    options: dict[str, Any] = {"decoder": "gaussian", "points": 4, "draws": 2, "seed": 3}
    whole = vdm(model, x, schedule, batch_size=7, **options)
    for i in range(5):
        alone = vdm(model, x[i : i + 1], schedule, sample_ids=[i], **options)
        assert torch.equal(alone.log_p, whole.log_p[i : i + 1])
        assert torch.equal(alone.stderr, whole.stderr[i : i + 1])


def test_the_probabilities_that_it_bounds_sum_to_one_at_most():
    x = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(256, 1, 1, 1)
    data, schedule = GaussianMixture([0.4, 0.6], [[-0.9], [0.2]], [0.05, 0.002]), schedules.cosine(200, prediction="v")
    result = vdm(data.model(schedule), x, schedule, points=16, draws=4, batch_size=4000, clip=1.0)
    total, error = result.log_p.exp().sum(), (result.log_p.exp() * result.stderr).norm()
    assert 0.2 < total < 1 + 3 * error


def test_what_is_wrong_is_said():
    schedule, x = schedules.cosine(8, prediction="v"), torch.ones(2, 1, 2, 2)

    def refused(what: str, x: Tensor = x, schedule: schedules.Schedule = schedule, **options: Any):
        with pytest.raises(ValueError, match=what):
            vdm(lambda x_t, t: 0.1 * x_t, x, schedule, **options)

    refused("points must be at least 3, not 2", points=2)
    refused("draws", draws=0)
    refused("no variance is named 'learned_range'", variance="learned_range")
    refused("lies between two", 0 * x)
    refused("needs v or x0", schedule=schedules.rescale_zero_snr(schedules.linear(8)))

"""The discrete-time bound: its terms against closed forms, the bound against exact log p(x), and its error bars against
the spread of many seeds, which are copies of a sample with ids of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import noise_keys, schedules
from diffkern.likelihood import GaussianMixture, Likelihood, vlb, vlb_table
from diffkern.ops.vlb_term import C1, K0, LOGVAR_MAX, VAR
from diffkern.schedules import Schedule

MIXTURE = GaussianMixture([0.3, 0.7], [[-0.5, 0.2], [0.4, -0.1]], [0.05, 0.02])
MEAN, SPREAD = 0.3, 0.4
GAUSSIAN = GaussianMixture([1.0], [[MEAN, MEAN]], [SPREAD**2])


def even(T: int) -> Schedule:
    """Even in log-SNR between fixed ends."""
    log_snr = torch.linspace(11, -9, T, dtype=torch.float64)
    return Schedule(torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt(), prediction="v")


SCHEDULES = {
    "vp, epsilon": schedules.linear(6, beta_start=0.01, beta_end=0.7),
    "vp, v, zero terminal SNR": schedules.rescale_zero_snr(schedules.cosine(6, prediction="v")),
    "vp, x0": schedules.cosine(6, prediction="x0"),
    "flow": schedules.flow(6, shift=2.0),
    "edm": schedules.edm(6, sigma_min=0.1),
}


def copies(mixture: GaussianMixture, x: Tensor, schedule: Schedule, n: int, **options: Any) -> Likelihood:
    """n estimates for each of x, with independent noise: result [i] is of x[i % len(x)]."""
    return vlb(mixture.model(schedule), x.repeat(n, 1), schedule, decoder="gaussian", batch_size=20000, **options)


def of_each(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean over the copies, and its standard error."""
    values = values.reshape(-1, count, *values.shape[1:])
    return values.mean(0), values.std(0) / len(values) ** 0.5


def closed_form(schedule: Schedule, x: Tensor, variance: str) -> tuple[Tensor, Tensor, Tensor]:
    """The expected prior, transitions and decoder of samples x [n, 2] of GAUSSIAN, for the fixed variances."""
    a, s, total = schedule.alpha_t, schedule.sigma_t, GAUSSIAN.variances.item()
    gain = a * total / (a**2 * total + s**2)
    off = ((x[:, None] - MEAN) * (1 - gain * a)[:, None]).square() + (gain * s).square()[:, None]
    off = off.sum(2)  # E |x_0 - x_0_hat|^2, [n, T]
    ratio = a[1:] / a[:-1]
    beta = s[1:] ** 2 - ratio**2 * s[:-1] ** 2
    true = beta * s[:-1] ** 2 / s[1:] ** 2
    used = true if variance == "fixed_small" else beta
    weight = a[:-1] * beta / s[1:] ** 2
    steps = (used / true).log() - 1 + true / used + weight**2 * off[:, 1:] / (2 * used)
    last = true[0] if variance == "fixed_small" else s[0] ** 2
    decoder = (2 * math.pi * last).log() + off[:, 0] / (2 * last)
    v = s[-1] ** 2 if schedule.path == "ve" else 1.0
    prior = s[-1] ** 2 / v - 1 - (s[-1] ** 2 / v).log() + a[-1] ** 2 * x.square().sum(1) / (2 * v)
    return prior, steps, decoder


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_term_is_that_of_the_closed_form(name: str, variance: str):
    schedule, x = SCHEDULES[name], torch.tensor([[0.1, 0.9], [-0.4, 0.3]], dtype=torch.float64)
    result = copies(GAUSSIAN, x, schedule, 1500, variance=variance)
    prior, steps, decoder = closed_form(schedule, x, variance)
    torch.testing.assert_close(result.terms["prior"][:2], prior, rtol=1e-9, atol=1e-12)
    for found, expected in ((result.terms["transitions"], steps), (result.terms["decoder"], decoder)):
        mean, stderr = of_each(found, 2)
        assert ((mean - expected).abs() <= 4.5 * stderr + 1e-9).all()
    total = sum(v if v.dim() == 1 else v.sum(1) for v in result.terms.values())
    torch.testing.assert_close(result.log_p, -total)


@pytest.mark.parametrize("make", [even, schedules.flow, schedules.edm], ids=["even", "flow", "edm"])
def test_on_gaussian_data_the_gap_falls_as_one_over_the_steps(make):
    # E |x_0 - x_0_hat|^2 over the data is a closed form, so the table alone gives the mean bound
    entropy = math.log(2 * math.pi * math.e * SPREAD**2)
    gaps = {}
    for T in (30, 100, 300, 1000):
        schedule = make(T)
        table, last = vlb_table(schedule, "fixed_large", "gaussian"), schedule.sigma_t[-1] ** 2
        off = SPREAD**2 / (1 + (schedule.alpha_t / schedule.sigma_t).square() * SPREAD**2)
        logvar = table[:, LOGVAR_MAX]
        terms = table[:, K0] + logvar + (table[:, VAR] + table[:, C1] ** 2 * off) * torch.exp(-logvar)
        v = last if schedule.path == "ve" else torch.ones_like(last)
        prior = last / v - 1 - (last / v).log() + schedule.alpha_t[-1] ** 2 * (SPREAD**2 + MEAN**2) / v
        gaps[T] = (terms.sum() + prior).item() - entropy
    assert gaps[1000] > 0
    assert gaps[30] > 2.5 * gaps[100] > 6 * gaps[300]
    # what is left at T = 1000 is of the ends: less than 0.01 nats
    assert abs(gaps[1000] - 0.3 * gaps[300]) < 0.01


@pytest.mark.parametrize("name", ["even", "flow", "edm"])
def test_it_is_below_log_p_and_converges_to_it(name: str):
    make = {"even": even, "flow": schedules.flow, "edm": schedules.edm}[name]
    x = MIXTURE.sample(noise_keys(5, 4))
    gaps = []
    for T in (30, 100, 1000):
        mean, stderr = of_each(copies(MIXTURE, x, make(T), 400, variance="fixed_large", terms=12).log_p, 4)
        gap = MIXTURE.log_prob(x) - mean
        assert (gap > -4 * stderr).all()
        gaps.append((gap.mean().item(), stderr.norm().item() / 4))
    (coarse, _), (middle, error), (fine, fine_error) = gaps
    assert abs(middle - 0.3 * coarse) < 4 * error + 0.06 * coarse  # 1 / T
    assert abs(fine - 0.03 * coarse) < 4 * fine_error


def test_a_wrong_denoiser_has_a_worse_bound():
    schedule, x = even(50), MIXTURE.sample(noise_keys(5, 64))
    right, wrong = MIXTURE.model(schedule), GaussianMixture([1.0], [[0.1, 0.0]], [0.2]).model(schedule)
    options: dict[str, Any] = {"decoder": "gaussian", "variance": "fixed_large", "batch_size": 4000}
    better, worse = (vlb(m, x, schedule, **options) for m in (right, wrong))  # with the same noise
    difference = better.log_p - worse.log_p
    assert difference.mean() > 4 * difference.std() / 8


@pytest.mark.parametrize("options", [{}, {"draws": 2}, {"terms": 8}, {"terms": 8, "draws": 2}], ids=str)
def test_the_error_bars_are_true(options: dict[str, int]):
    schedule, x = schedules.cosine(30, prediction="v"), MIXTURE.sample(noise_keys(5, 6))
    result = copies(MIXTURE, x, schedule, 250, **options)
    spread = result.log_p.reshape(250, 6).var(0).mean().sqrt()
    said = result.stderr.square().mean().sqrt()
    assert 0.85 < said / spread < 1.2  # the spread of 6 x 250 is known to 2 %; neighbours judge by up to 10 % less
    of_terms = {name: error.square().reshape(len(x) * 250, -1).sum(1) for name, error in result.terms_stderr.items()}
    torch.testing.assert_close(sum(of_terms.values()), result.stderr.square())
    assert of_terms["prior"].eq(0).all()
    for name in ("decoder", "transitions"):
        spread = result.terms[name].reshape(250, 6, -1).var(0).sum(1).mean().sqrt()
        assert 0.8 < of_terms[name].mean().sqrt() / spread < 1.25, name  # as above, of a part of the sum


def test_random_timesteps_have_the_mean_of_all():
    schedule, x = schedules.cosine(30, prediction="v"), MIXTURE.sample(noise_keys(5, 6))
    whole, whole_error = of_each(copies(MIXTURE, x, schedule, 200).log_p, 6)
    part, part_error = of_each(copies(MIXTURE, x, schedule, 1000, terms=5).log_p, 6)
    assert ((whole - part).abs() < 4 * (whole_error**2 + part_error**2).sqrt()).all()


def test_a_sample_is_the_same_alone_and_in_any_batch():
    schedule, x = schedules.cosine(9, prediction="v"), MIXTURE.sample(noise_keys(5, 5))

    def model(x_t: Tensor, t: Tensor) -> Tensor:  # of elements: a matrix product may depend on the batch
        return torch.tanh(x_t) * torch.cos(t)[:, None]

    both: tuple[dict[str, Any], ...] = ({}, {"terms": 4, "draws": 2})
    for options in both:
        whole = vlb(model, x, schedule, decoder="gaussian", seed=3, batch_size=7, **options)
        for i in range(5):
            alone = vlb(model, x[i : i + 1], schedule, decoder="gaussian", seed=3, sample_ids=[i], **options)
            assert torch.equal(alone.log_p, whole.log_p[i : i + 1])
            assert torch.equal(alone.stderr, whole.stderr[i : i + 1])
        other = vlb(model, x, schedule, decoder="gaussian", seed=4, **options)
        assert not (other.log_p == whole.log_p).any()


def test_float32_is_float64_but_for_rounding():
    # in units of the true variance the large terms of a KL cancel exactly
    levels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    schedule = schedules.linear(300, clip=1.0)

    def bound(dtype: torch.dtype) -> Tensor:
        return vlb(lambda x_t, t: 0.9 * x_t, levels.to(dtype) / 127.5 - 1, schedule).log_p

    torch.testing.assert_close(bound(torch.float32), bound(torch.float64), rtol=2e-6, atol=0)


def test_learned_variances_at_their_ends_are_the_fixed_ones():
    schedule = schedules.cosine(12, prediction="v")
    x = (torch.randint(0, 256, (3, 2, 2, 2), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).double()

    def model(v: float | None) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x_t: Tensor, t: Tensor) -> Tensor:
            m = 0.3 * x_t - 0.1
            return m if v is None else torch.cat([m, torch.full_like(m, v)], 1)

        return call

    for v, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        for decoder in ("discretized", "gaussian"):
            fixed = vlb(model(None), x, schedule, variance=variance, decoder=decoder)
            learned = vlb(model(v), x, schedule, variance="learned_range", decoder=decoder)
            torch.testing.assert_close(learned.log_p, fixed.log_p, rtol=1e-12, atol=0)
    # a variance that is not asked for is left aside
    torch.testing.assert_close(vlb(model(0.5), x, schedule).log_p, vlb(model(None), x, schedule).log_p)
    with pytest.raises(ValueError, match=r'"learned_range" needs a model that puts out \[4, 2, 2\] numbers'):
        vlb(model(None), x, schedule, variance="learned_range")


def test_the_probabilities_that_it_bounds_sum_to_one_at_most():
    # One pixel: the decoder's part of each level, given the same x_t, is a distribution over the 256. A bound of all
    # of them, exp(E log), is less than one; a density, or a bin left out, would not be.
    x = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(256, 1, 1, 1)
    data = GaussianMixture([0.4, 0.6], [[-0.9], [0.2]], [0.05, 0.002])
    schedule = even(40)
    for variance in ("fixed_small", "fixed_large"):
        result = vlb(data.model(schedule), x, schedule, variance=variance, draws=3, batch_size=4000, clip=1.0)
        total = result.log_p.exp().sum()
        error = (result.log_p.exp() * result.stderr).norm()
        assert 0.2 < total < 1 + 3 * error
    # by far the likeliest levels are those of the narrow component
    assert result.log_p.argmax().item() in range(140, 166)


def test_the_bundled_model_rates_a_flat_picture_above_noise():
    diffusion = diffkern.load("emoji-32")
    noise = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    x = torch.cat([torch.ones(1, 3, 32, 32), noise])
    result = vlb(diffusion, x, terms=6)
    assert result.method == "vlb"
    assert result.dims == 3072
    flat, noisy = result.bits_per_dim.tolist()
    assert flat < 2 < 8 < noisy  # noise is worth 8 bits
    alone = vlb(diffusion, x[1:], terms=6, sample_ids=[1], batch_size=5)
    torch.testing.assert_close(alone.log_p, result.log_p[1:], rtol=1e-6, atol=0)


def test_what_is_wrong_is_said():
    schedule, x = schedules.cosine(8, prediction="v"), torch.zeros(2, 1, 2, 2)
    pixels = torch.ones(2, 1, 2, 2)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x_t

    def refused(what: str, x: Any = pixels, network: Any = model, schedule: Schedule = schedule, **options: Any):
        with pytest.raises(ValueError, match=what):
            vlb(network, x, schedule, **options)

    refused("lies between two", x)
    refused(r"on \[-1, 1\], but x runs from 2 to 2", 2 * pixels)
    refused("not finite", pixels * math.nan)
    refused("floating-point tensor", [0.0])
    refused("from 3 to 7", terms=2)
    refused("from 3 to 7", terms=8)
    refused("draws", draws=0)
    refused("batch_size", batch_size=0)
    refused("no variance is named 'small'", variance="small")
    refused("no decoder is named 'exact'", decoder="exact")
    refused("clip must be > 0", clip=-1.0)
    refused("labels", labels=[1, 2, 3])
    refused("2 samples but 1 sample_ids", sample_ids=[0])
    refused(r"made \[3, 2, 2\] numbers", network=lambda x, t: x.repeat(1, 3, 1, 1))
    refused("needs v or x0", schedule=schedules.rescale_zero_snr(schedules.linear(8)))
    refused("at least 2 timesteps, not 1", schedule=schedules.linear(1))
    emoji = diffkern.load("emoji-32")
    refused(r"shape \[3, 32, 32\], not \[1, 2, 2\]", network=emoji, schedule=emoji.schedule)

"""log p(x) along the probability-flow ODE against the exact one of mixtures, and x as its noise and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import schedules
from diffkern.likelihood import (
    Denoiser,
    GaussianMixture,
    Likelihood,
    decode,
    encode,
    ode_log_likelihood,
    round_trip_error,
)
from diffkern.schedules import Schedule

# Of mean 0: that of the noisiest timestep is then the standard normal's, up to the square of alpha_T.
ONE = GaussianMixture([0.4, 0.6], [[0.6], [-0.4]], [0.01, 0.04])
TWO = GaussianMixture([0.4, 0.6], [[0.6, 0.3], [-0.4, -0.2]], [0.02, 0.05])
EIGHT = GaussianMixture([0.5, 0.5], torch.tensor([[1.0], [-1.0]]) * torch.linspace(-0.5, 0.6, 8), [0.05, 0.1])
MIXTURES = {"1": ONE, "2": TWO, "8": EIGHT}
SCHEDULES = {
    "linear": schedules.linear(1000),
    "cosine, v": schedules.cosine(1000, prediction="v"),
    "zero terminal SNR, x0": schedules.rescale_zero_snr(schedules.cosine(100, prediction="x0")),
    "flow": schedules.flow(64, shift=3.0),
    "edm": schedules.edm(32),
}
TIGHT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


def points(mixture: GaussianMixture, n: int) -> Tensor:
    return mixture.sample(diffkern.noise_keys(1, n))


def exact(mixture: GaussianMixture, x: Tensor, schedule: Schedule) -> Tensor:
    """The log density that the ODE is of: that of x_0 + (sigma_0 / alpha_0) epsilon."""
    return mixture.log_prob(x, 1.0, (schedule.sigma_t[0] / schedule.alpha_t[0]).item())


def of(mixture: GaussianMixture, x: Tensor, schedule: Schedule, **options: Any) -> Likelihood:
    return ode_log_likelihood(mixture.model(schedule), x, schedule, **{"divergence": "exact", **TIGHT, **options})


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dims", MIXTURES)
def test_log_p_is_the_exact_one(name: str, dims: str):
    mixture, schedule = MIXTURES[dims], SCHEDULES[name]
    x = points(mixture, 6)
    result = of(mixture, x, schedule)
    assert (result.log_p - exact(mixture, x, schedule)).abs().max() < 1e-3
    assert result.stderr.eq(0).all()
    assert result.dims == int(dims)
    assert result.method == "ode"
    torch.testing.assert_close(-sum(result.terms.values()), result.log_p)


def test_a_wrong_score_is_found_out():
    schedule = SCHEDULES["linear"]
    right = TWO.model(schedule)
    x = points(TWO, 6)
    wrong = ode_log_likelihood(lambda x, t: 1.05 * right(x, t), x, schedule, divergence="exact", **TIGHT)
    assert (wrong.log_p - exact(TWO, x, schedule)).abs().max() > 0.05


@pytest.mark.parametrize("name", ["cosine, v", "flow", "edm"])
def test_probability_adds_up_to_one_even_of_a_wrong_model(name: str):
    """Whatever the model says, its ODE makes a density: what is lost in one place is found in another."""
    schedule = SCHEDULES[name]
    right = ONE.model(schedule)
    x = torch.linspace(-3, 3, 600, dtype=torch.float64)[:, None]
    for model in (right, lambda x, t: right(x, t) + 0.1 * torch.sin(2 * x)):
        log_p = ode_log_likelihood(model, x, schedule, divergence="exact", rtol=1e-5, atol=1e-6, batch_size=600).log_p
        assert torch.trapezoid(log_p.exp(), x[:, 0]).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_fixed_steps_converge_in_their_order(solver: str, order: int):
    schedule = SCHEDULES["cosine, v"]
    x = points(ONE, 8)
    best = of(ONE, x, schedule, rtol=1e-9, atol=1e-9).log_p
    coarse, fine = ((of(ONE, x, schedule, solver=solver, steps=n).log_p - best).abs().mean() for n in (40, 80))
    assert torch.log2(coarse / fine) > order - 0.4, (coarse, fine)


@pytest.mark.parametrize(("divergence", "probe"), [("hutchinson", "gaussian"), ("difference", "rademacher")])
def test_probes_estimate_the_divergence_without_bias(divergence: str, probe: str):
    """With many probes the estimate is within 4 of its standard errors of the exact one, on the same steps."""
    schedule = SCHEDULES["linear"]
    covariances = [[[0.1, 0.05], [0.05, 0.05]], [[0.1, 0.0], [0.0, 0.2]]]  # off its diagonal: what the probes' noise is
    mixture = GaussianMixture([0.4, 0.6], [[0.6, 0.3], [-0.4, -0.2]], covariances)
    x = points(mixture, 4)
    options: dict[str, Any] = {"solver": "rk4", "steps": 15}
    best = of(mixture, x, schedule, **options).log_p
    options |= {"divergence": divergence, "probe": probe}
    result = of(mixture, x, schedule, probes=32, **options)
    assert (result.stderr > 0).all()
    assert ((result.log_p - best).abs() < 4 * result.stderr + 1e-6).all()
    again = of(mixture, x, schedule, repeats=16, **options)
    assert ((again.log_p - best).abs() < 4 * again.stderr + 1e-6).all()
    # One probe, 16 times: the standard error of 32 probes times sqrt(32 / 16), within its own error.
    ratio = again.stderr.square().sum().sqrt() / result.stderr.square().sum().sqrt()
    assert 0.6 < ratio / (32 / 16) ** 0.5 < 1.6
    # The path is the same for every probe, so all of the error is the divergence's.
    for found in (result, again):
        torch.testing.assert_close(found.terms_stderr["divergence"], found.stderr)
        assert found.terms_stderr["prior"].max() < 1e-6
    assert of(mixture, x, schedule, **options).stderr.isnan().all()


def test_rademacher_probes_are_exact_in_one_dimension():
    x, schedule = points(ONE, 5), SCHEDULES["edm"]
    result = of(ONE, x, schedule, divergence="hutchinson")
    assert (result.log_p - exact(ONE, x, schedule)).abs().max() < 1e-3


def test_a_sample_is_the_same_alone_in_any_batch_and_by_its_id():
    schedule = SCHEDULES["linear"]
    x = points(TWO, 7)
    options = {"divergence": "hutchinson", "probes": 2, "repeats": 2, "rtol": 1e-4, "atol": 1e-4}
    x = x.clamp(-1, 1)
    options["dequantization"] = "variational"
    whole = of(TWO, x, schedule, **options)
    split = of(TWO, x, schedule, batch_size=3, **options)
    one = of(TWO, x[5:6], schedule, sample_ids=[5], **options)
    assert torch.equal(whole.log_p, split.log_p)
    assert torch.equal(whole.stderr, split.stderr)
    assert torch.equal(whole.log_p[5:6], one.log_p)
    assert torch.equal(whole.terms["prior"][5:6], one.terms["prior"])
    other = of(TWO, x[5:6], schedule, sample_ids=[5], seed=1, **options)
    assert not torch.equal(other.log_p, one.log_p)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_encoded_is_decoded(name: str):
    schedule = SCHEDULES[name]
    model, x = TWO.model(schedule), points(TWO, 5)
    error = round_trip_error(model, x, schedule, rtol=1e-8, atol=1e-8)
    assert error.shape == (5,)
    assert error.dtype == torch.float64
    assert error.max() < 1e-5


def test_the_noise_of_data_is_standard_normal():
    """In one dimension the ODE keeps the order of samples, so the noise of x is that of the same quantile."""
    schedule = SCHEDULES["edm"]
    x = torch.linspace(-0.9, 0.9, 9, dtype=torch.float64)[:, None]
    z = encode(ONE.model(schedule), x, schedule, rtol=1e-7, atol=1e-7)
    spread = (ONE.variances + math.tan(Denoiser.of(ONE.model(schedule), schedule).angles[0]) ** 2).sqrt()
    quantile = (ONE.weights * torch.special.ndtr((x - ONE.means[:, 0]) / spread)).sum(1)
    torch.testing.assert_close(torch.special.ndtr(z[:, 0]), quantile, rtol=1e-3, atol=1e-3)  # of alpha_T / sigma_T
    back = decode(ONE.model(schedule), z, schedule, solver="rk4", steps=200)
    assert (back - x).abs().max() < 1e-3


def test_a_network_scores_and_stays_as_it_was():
    bundle = diffkern.load("emoji-32")
    x = torch.zeros(2, 3, 32, 32)
    x[1] = diffkern.randn(diffkern.noise_keys(0, 1), [3, 32, 32], 0)[0].clamp(-1, 1)
    weights = {p: p.requires_grad for p in bundle.model.parameters()}
    by = {
        divergence: ode_log_likelihood(
            bundle, x, divergence=divergence, solver="heun", steps=4, dequantization="uniform", labels=[1, 2]
        )
        for divergence in ("hutchinson", "difference")
    }
    grey, noise = by["hutchinson"].bits_per_dim.tolist()
    assert grey < noise - 1
    difference = (by["hutchinson"].bits_per_dim - by["difference"].bits_per_dim).abs().max()
    assert difference < 5e-3  # of O(h^2) in float32
    assert {p: p.requires_grad for p in bundle.model.parameters()} == weights
    assert set(by["difference"].terms) == {"prior", "divergence", "dequantization"}


def test_a_picture_scores_the_same_in_any_batch_under_batch_invariant():
    """By forward passes, that is: what needs a gradient is computed as ever."""
    bundle = diffkern.load("emoji-32")
    x = diffkern.randn(diffkern.noise_keys(0, 2), [3, 32, 32], 0).clamp(-1, 1)
    options: dict[str, Any] = {"divergence": "difference", "solver": "heun", "steps": 1}
    with diffkern.batch_invariant():
        both = ode_log_likelihood(bundle, x, **options)
        one = ode_log_likelihood(bundle, x[1:], sample_ids=[1], **options)
    assert torch.equal(both.log_p[1:], one.log_p)


def test_the_scales_at_both_ends_are_right():
    """On a short arc, at whose ends they do not cancel, and data that is all but one point: z is a multiple of x."""
    schedule = schedules.edm(32, sigma_min=0.5, sigma_max=4.0)
    point = GaussianMixture([1.0], [[0.0]], [1e-6])
    x = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    assert (of(point, x, schedule).log_p - exact(point, x, schedule)).abs().max() < 1e-4
    torch.testing.assert_close(encode(point.model(schedule), x, schedule), x / 0.5, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named():
    schedule = SCHEDULES["linear"]
    model, x = TWO.model(schedule), torch.zeros(3, 2, dtype=torch.float64)

    def refused(message: str, x: Tensor = x, model: Any = model, schedule: Schedule = schedule, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ode_log_likelihood(model, x, schedule, **options)

    refused("no divergence is named 'trace'", divergence="trace")
    refused("no probe is named", probe="normal")
    refused("no solver is named 'euler': choose one of dopri5, heun, rk4", solver="euler")
    refused("no dequantization is named", dequantization="flow")
    refused(r"8-bit images on \[-1, 1\], but x runs from 0 to 1.5", torch.full((1, 2), 1.5) * torch.tensor([0, 1]),
            dequantization="uniform")  # fmt: skip
    refused("x has numbers that are not finite", x / 0)
    refused("at most 4096 of them, not 5000", torch.zeros(1, 5000), divergence="exact")
    refused("there are 3 samples but 2 sample_ids", sample_ids=[1, 2])
    refused("labels must be one or 3 whole numbers", labels=[1, 2])
    refused("repeats must be > 0, not 0", repeats=0)
    refused("steps must be > 0, not 0", solver="rk4", steps=0)
    refused("rtol must be > 0", rtol=-1.0)
    refused("its output has no gradient in x", model=lambda x, t: model(x.detach(), t))
    refused("epsilon .* alpha_t = 0", schedule=schedules.rescale_zero_snr(schedules.linear(10)))
    refused("floating-point tensor", x.to(torch.int64))


def test_no_sample_is_no_error():
    schedule = SCHEDULES["flow"]
    empty = torch.zeros(0, 2, dtype=torch.float64)
    assert len(of(TWO, empty, schedule)) == 0
    assert encode(TWO.model(schedule), empty, schedule).shape == (0, 2)

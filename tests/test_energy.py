"""Energy differences from a score, against the exact log density; and how they depend on the path."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import noise_keys, schedules
from diffkern.layout import per_sample
from diffkern.likelihood import Denoiser, GaussianMixture, energy_difference, path_dependence
from diffkern.ops.randn import normal

MIXTURE = GaussianMixture([0.3, 0.45, 0.25], [[1.0, 0.5], [-0.8, 0.9], [-0.2, -1.1]], [0.12, 0.06, 0.2])
SCHEDULES = {
    "vp, epsilon": schedules.linear(100),
    "vp, v": schedules.cosine(100, prediction="v"),
    "flow": schedules.flow(100),
    "edm": schedules.edm(100),
}
N = 6


def points(count: int = 4) -> Tensor:
    """Ends and corners of N paths: [count, N, 1, 2]."""
    return normal(noise_keys(0, N), (count, 1, 2), 0, torch.float64).transpose(0, 1)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_energy_difference_is_that_of_the_exact_log_density(schedule: schedules.Schedule):
    x_a, x_b, *through = points()
    t = torch.tensor([0, 10, 30, 50, 80, 99])
    alpha, sigma = schedule.alpha_t[t], schedule.sigma_t[t]
    exact = MIXTURE.log_prob(x_a, alpha, sigma) - MIXTURE.log_prob(x_b, alpha, sigma)
    model = MIXTURE.model(schedule)

    straight = energy_difference(model, x_a, x_b, t, schedule, nodes=128, batch_size=1000)

    torch.testing.assert_close(straight, exact, rtol=1e-9, atol=1e-9)
    bent = energy_difference(model, x_a, x_b, t, schedule, nodes=129, through=torch.stack(through))
    torch.testing.assert_close(bent, exact, rtol=1e-9, atol=1e-9)
    few = energy_difference(model, x_a, x_b, t, schedule, nodes=3)
    assert (few - exact).abs().max() > 1e-6  # the nodes matter, so the test above says something


def test_a_pair_is_the_same_in_any_batch_and_minus_itself_backwards():
    schedule, (x_a, x_b) = SCHEDULES["vp, v"], points(2)
    model = MIXTURE.model(schedule)
    together = energy_difference(model, x_a, x_b, 40, schedule)
    assert together.shape == (N,)
    for size in (1, 7, 1000):
        again = energy_difference(model, x_a, x_b, 40, schedule, batch_size=size)
        torch.testing.assert_close(again, together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(energy_difference(model, x_a[2:3], x_b[2:3], 40, schedule), together[2:3])
    torch.testing.assert_close(energy_difference(model, x_b, x_a, 40, schedule), -together)
    assert energy_difference(model, x_a[:0], x_b[:0], 40, schedule).shape == (0,)


def test_only_what_is_no_gradient_depends_on_the_path():
    """A rotation w (-x_2, x_1) added to the score adds 2 w times the area that it is integrated round (Stokes)."""
    schedule, (x_a, x_b, *through) = SCHEDULES["vp, epsilon"], points()
    detour = torch.stack(through)
    assert path_dependence(MIXTURE.model(schedule), x_a, x_b, 60, schedule, through=detour, nodes=64).abs().max() < 1e-9

    w, sigma = 0.7, schedule.sigma_t[60]

    def turning(x: Tensor, time: Tensor) -> Tensor:
        rotated = torch.stack([-x[..., 1], x[..., 0]], -1)
        return MIXTURE.model(schedule)(x, time) - per_sample(sigma.expand(len(x)), x) * w * rotated

    loop = torch.stack([x_a, *through, x_b]).squeeze(2)
    following = loop.roll(-1, 0)
    area = 0.5 * (loop[..., 0] * following[..., 1] - loop[..., 1] * following[..., 0]).sum(0)
    torch.testing.assert_close(
        path_dependence(turning, x_a, x_b, 60, schedule, through=detour, nodes=64), -2 * w * area, rtol=1e-9, atol=1e-9
    )


def test_a_network_knows_the_energy_of_noise():
    """At the noisiest timestep log p_t is that of N(0, I), whatever the pictures."""
    model = diffkern.load("emoji-32")
    T = len(model.schedule)
    noise = diffkern.randn(noise_keys(0, 3), [3, 32, 32])
    expected = (1.2**2 - 1) / 2 * noise.flatten(1).square().sum(1).to(torch.float64)
    found = energy_difference(model, noise, 1.2 * noise, T - 1, nodes=3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_bad_arguments_are_named():
    schedule, (x_a, x_b) = SCHEDULES["vp, v"], points(2)
    denoiser = Denoiser.of(MIXTURE.model(schedule), schedule)
    blind = schedules.rescale_zero_snr(schedules.linear(100))
    for message, call in {
        r"one shape, not \[6, 1, 2\] and \[5, 1, 2\]": lambda: energy_difference(denoiser, x_a, x_b[:5], 3),
        "x_b has numbers that are not finite": lambda: energy_difference(denoiser, x_a, x_b * math.nan, 3),
        r"through must be \[W, \*\[6, 1, 2\]\]": lambda: energy_difference(denoiser, x_a, x_b, 3, through=x_a),
        "nodes must be > 0": lambda: energy_difference(denoiser, x_a, x_b, 3, nodes=0),
        "t must be timesteps of the schedule": lambda: energy_difference(denoiser, x_a, x_b, 100),
        "t must be one or 6 whole timesteps": lambda: energy_difference(denoiser, x_a, x_b, torch.tensor([1, 2])),
        "must predict v or x0": lambda: energy_difference(MIXTURE.model(blind), x_a, x_b, 99, blind),
        "give the schedule": lambda: energy_difference(denoiser.model, x_a, x_b, 3),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()

"""What a model knows of p(x) at a noise level, against closed forms: for data N(mean, spread^2) everything is known."""

from __future__ import annotations

import pytest
import torch

from diffkern import schedules
from diffkern.layout import per_sample
from diffkern.likelihood import Denoiser, GaussianMixture
from diffkern.schedules import Schedule

MEAN, SPREAD = 0.4, 0.3
SCHEDULES = {
    "vp, epsilon": schedules.linear(100),
    "vp, v, zero terminal SNR": schedules.rescale_zero_snr(schedules.cosine(100, prediction="v")),
    "vp, x0": schedules.scaled_linear(50, prediction="x0"),
    "flow": schedules.flow(64, shift=3.0),
    "edm": schedules.edm(32),
}


def perfect(schedule: Schedule) -> Denoiser:
    """The model of data N(MEAN, SPREAD^2), in the schedule's prediction; it finds its noise level by the time that it
    is told."""
    data = GaussianMixture([1.0], [[MEAN] * 6], [SPREAD**2])
    return Denoiser.of(data.model(schedule), schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_x0_epsilon_and_velocity_are_those_of_a_gaussian_between_timesteps_too(name: str):
    schedule = SCHEDULES[name]
    denoiser = perfect(schedule)
    first, last = denoiser.angles
    levels = denoiser.at_angle(torch.linspace(first, last, 41, dtype=torch.float64)[1:-1])
    x = torch.randn(39, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = per_sample(levels.radius, x) * x
    alpha, sigma = per_sample(levels.alpha, x), per_sample(levels.sigma, x)
    variance = alpha**2 * SPREAD**2 + sigma**2

    x0, epsilon = denoiser.predict(x, levels)

    torch.testing.assert_close(epsilon, sigma * (x - alpha * MEAN) / variance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alpha * x0 + sigma * epsilon, x, rtol=1e-9, atol=1e-9)
    velocity = (alpha * epsilon - sigma * x0) / per_sample(levels.radius, x)
    torch.testing.assert_close(denoiser.velocity(x, levels), velocity, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_levels_of_an_angle_meet_those_of_the_timesteps(name: str):
    schedule = SCHEDULES[name]
    denoiser = perfect(schedule)
    exact = denoiser.at(torch.arange(len(schedule)))

    by_angle = denoiser.at_angle(torch.atan2(exact.sigma, exact.alpha))

    torch.testing.assert_close(exact.alpha, schedule.alpha_t)
    torch.testing.assert_close(exact.time, schedule.times)
    radius = exact.radius if schedule.path == "vp" else torch.ones_like(exact.alpha)  # betas leave it 1 up to rounding
    torch.testing.assert_close(by_angle.alpha, exact.alpha / radius, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_angle.sigma, exact.sigma / radius, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_angle.time, exact.time, rtol=1e-6, atol=1e-6)


def test_a_likelihood_needs_a_schedule_of_two_timesteps():
    with pytest.raises(ValueError, match="schedule="):
        Denoiser.of(lambda x, t: x)
    with pytest.raises(ValueError, match="at least 2 timesteps, not 1"):
        Denoiser.of(lambda x, t: x, schedules.linear(1))

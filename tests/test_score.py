"""The score of a perfect model is that of its data, at every timestep and for every prediction."""

from __future__ import annotations

import pytest
import torch

import diffkern
from diffkern import schedules
from diffkern.layout import per_sample
from diffkern.likelihood import GaussianMixture, score
from diffkern.ops.randn import normal

MIXTURE = GaussianMixture([0.4, 0.6], [[0.6, -0.2], [-0.4, 0.3]], [0.01, 0.04])
SCHEDULES = {
    "vp, epsilon": schedules.linear(100),
    "vp, v, zero terminal SNR": schedules.rescale_zero_snr(schedules.cosine(50, prediction="v")),
    "vp, x0": schedules.scaled_linear(50, prediction="x0"),
    "flow": schedules.flow(64, shift=3.0),
    "edm": schedules.edm(32),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_score_is_the_mixtures_at_every_timestep(name: str):
    schedule = SCHEDULES[name]
    t = torch.arange(len(schedule))
    alpha, sigma = schedule.alpha_t, schedule.sigma_t
    noise = normal(diffkern.noise_keys(0, len(t)), (2,), 0, torch.float64)
    x = per_sample(alpha, noise) * 0.5 + per_sample(sigma, noise) * noise

    s = score(MIXTURE.model(schedule), x, t, schedule)

    torch.testing.assert_close(s, MIXTURE.score(x, alpha, sigma), rtol=1e-6, atol=1e-6)  # a float64 time, of log sigma
    one = score(MIXTURE.model(schedule), x, 7, schedule)
    torch.testing.assert_close(one[7], s[7], rtol=1e-9, atol=1e-9)


def test_the_score_is_in_the_dtype_of_x_and_of_the_label():
    model = diffkern.load("emoji-32")
    x = diffkern.randn(diffkern.noise_keys(0, 2), [3, 32, 32], 0)
    s = score(model, x, 500)
    assert s.dtype == torch.float32
    assert s.shape == x.shape
    alpha, sigma = model.schedule.alpha_t[500].item(), model.schedule.sigma_t[500].item()
    with torch.no_grad():  # it predicts v = alpha epsilon - sigma x_0
        v = model.model(x, torch.full((2,), 500.0), torch.tensor([model.model.null_label] * 2))
    torch.testing.assert_close(s, -(sigma * x + alpha * v) / sigma, rtol=1e-4, atol=1e-4)
    labelled = score(model, x, 500, labels=[1, model.model.null_label])
    assert torch.allclose(labelled[1], s[1], atol=1e-4)
    assert not torch.allclose(labelled[0], s[0], atol=1e-4)


def test_bad_arguments_are_named():
    schedule = SCHEDULES["vp, epsilon"]
    model, x = MIXTURE.model(schedule), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="schedule, 0 to 99"):
        score(model, x, 100, schedule)
    with pytest.raises(ValueError, match="one or 3 whole timesteps"):
        score(model, x, torch.tensor([1, 2]), schedule)
    with pytest.raises(ValueError, match="one or 3 whole timesteps"):
        score(model, x, torch.tensor(0.5), schedule)
    with pytest.raises(ValueError, match="x has numbers that are not finite"):
        score(model, x / 0, 1, schedule)
    with pytest.raises(ValueError, match="floating-point tensor"):
        score(model, x.long(), 1, schedule)
    noisiest = schedules.rescale_zero_snr(schedules.linear(10))
    with pytest.raises(ValueError, match=r"epsilon .* alpha_t = 0"):
        score(MIXTURE.model(noisiest), x, 9, noisiest)

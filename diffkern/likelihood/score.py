"""The score of a diffusion model: the gradient of log p_t, which it was trained to know (Song et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.layout import per_sample
from diffkern.likelihood.denoiser import Denoiser
from diffkern.likelihood.inputs import labels_of, samples_of, timesteps_of
from diffkern.schedules import Schedule


@torch.no_grad()
def score(model: Any, x: Tensor, t: int | Tensor, schedule: Schedule | None = None, *, labels: Any = None) -> Tensor:
    """The gradient of log p(x_t) in x_t, as the model has it: -epsilon_hat / sigma_t, which is
    (alpha_t x0_hat - x_t) / sigma_t^2 (Vincent 2011; Song et al. 2021, eq. 9).

    model: a Denoiser, a `Diffusion`, or a callable with its schedule. x: [B, ...], x_t itself. t: a timestep of the
    schedule, or int64 [B]. labels: one or B classes, by default the null label of a class-conditional model.
    Returns [B, ...] in the dtype of x, on the model's device. Raises ValueError for numbers that are not finite and for
    timesteps that the schedule does not have."""
    denoiser = Denoiser.of(model, schedule)
    x = samples_of(x)
    levels, classes = denoiser.at(timesteps_of(denoiser, t, len(x))), labels_of(denoiser, labels, len(x))
    x = x.to(denoiser.device)
    _, epsilon = denoiser.predict(x, levels, classes)
    return -per_sample(1 / levels.sigma, x).to(x.dtype) * epsilon

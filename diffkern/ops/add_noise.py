"""The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) (Ho et al. 2020, eq. 4; Kingma et al. 2021, eq. 1), with
the schedule looked up and the noise drawn inside the op."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.op import Cost, Sample, op
from diffkern.ops.layout import accumulate, memory_format, per_sample
from diffkern.ops.randn import Draw, normal


@op
def add_noise(
    x0: Tensor,
    timestep: Tensor,
    alpha_sigma: Tensor,
    keys: Tensor,
    draw: int = int(Draw.TRAINING),
    return_noise: bool = False,
) -> tuple[Tensor, Tensor]:
    """x_t = alpha_t x_0 + sigma_t epsilon, with epsilon = randn(keys, x0.shape[1:], draw).

    x0: [B, ...]. timestep: int64 [B], row of alpha_sigma. alpha_sigma: float32 [T, 2]. keys: int64 [B, 2].
    Returns (x_t, epsilon), both with the shape, dtype and layout of x0; epsilon is empty unless return_noise."""
    acc, layout = accumulate(x0.dtype), memory_format(x0)
    alpha, sigma = alpha_sigma[timestep].to(acc).unbind(-1)
    noise = normal(keys, x0.shape[1:], draw, acc)
    x_t = per_sample(alpha, x0) * x0.to(acc) + per_sample(sigma, x0) * noise
    x_t = x_t.to(x0.dtype).contiguous(memory_format=layout)
    return x_t, noise.to(x0.dtype).contiguous(memory_format=layout) if return_noise else x0.new_empty(0)

"""Normal distributions with independent numbers, in nats: densities and divergences."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_normal(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mean, exp(logvar)), summed over all but the first size: float64 [B]. z, mean, logvar: [B, ...]."""
    each = (z - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)
    return -0.5 * each.flatten(1).sum(1, dtype=torch.float64)


def kl_normal(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(prior_mean, exp(prior_logvar))), summed over all but the first size: float64 [B].
    Each [B, ...]."""
    excess = logvar - prior_logvar
    each = (mean - prior_mean) ** 2 * torch.exp(-prior_logvar) + torch.expm1(excess) - excess
    return 0.5 * each.flatten(1).sum(1, dtype=torch.float64)

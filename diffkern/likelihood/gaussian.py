"""Normal distributions with independent numbers, in nats: densities, divergences, and the mass of an interval."""

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


def log_bin(x: Tensor, mean: Tensor, log_std: Tensor, levels: int) -> Tensor:
    """log P of the level x, of `levels` evenly spaced on [-1, 1], where N(mean, exp(log_std)) is rounded to them: the
    outermost reach to infinity (Ho et al. 2020, eq. 13). Element by element, in the dtype of x; exact in the tails,
    where a difference of two cumulative distributions would be 0."""
    half = 1 / (levels - 1)
    lower, upper = (x - half - mean) * torch.exp(-log_std), (x + half - mean) * torch.exp(-log_std)
    lowest, highest = x <= half - 1, x >= 1 - half
    # Phi(upper) - Phi(lower), or its mirror image Phi(-lower) - Phi(-upper), whichever is of the smaller numbers.
    mirrored = highest | (~lowest & (lower + upper > 0))
    above, below = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    whole = torch.special.log_ndtr(above)
    outermost = lowest | highest
    gap = (torch.special.log_ndtr(below) - whole).masked_fill(outermost, -1.0)  # any: a 0 would make NaN gradients
    return whole + torch.log(-torch.expm1(gap)).masked_fill(outermost, 0.0)

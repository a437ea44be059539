"""Dequantisation: the probability of an 8-bit image, bounded by the density of noise added within its bins.

log P(x) >= E_q[log p(x + u) - log q(u | x)], for any density q of u on the bin of x, whose width is 2 / 255 in every
dimension (Theis et al. 2016; Ho et al. 2019, "Flow++", eq. 12). The bin of an image is what rounds to it: it reaches
half a bin beyond -1 and 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.ops.randn import Draw, normal

DEQUANTIZATIONS = ("uniform", "variational")
HALF_BIN = 1 / 255


def dequantize(kind: str, x: Tensor, ratio: float, keys: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """(x + u, log q(u | x)): [B, ...] and [B], float64.

    kind: "uniform" over the bin, or "variational", the normal of the least noise that the model knows, sigma_0 /
    alpha_0, cut off at the bin (Zheng et al. 2023, section 4.2): what the model saw in training, and all that a
    perfect model's density is made of where its data lies on the bins' centres, so that the bound is an equality there.
    ratio: sigma_0 / alpha_0. keys: int64 [B, 2]. draw: int64 [B], which noise of each."""
    uniform = torch.special.ndtr(normal(keys, x.shape[1:], draw + int(Draw.DEQUANTIZE), torch.float64))
    if kind == "uniform":
        u = (2 * uniform - 1) * HALF_BIN
        log_q = torch.full_like(u, -math.log(2 * HALF_BIN))
    else:
        bound = HALF_BIN / ratio
        inside = math.erf(bound / 2**0.5)  # of the normal's mass
        standard = torch.special.ndtri(0.5 + (uniform - 0.5) * inside).clamp(-bound, bound)
        u = ratio * standard
        log_q = -0.5 * standard**2 - math.log(ratio * (2 * math.pi) ** 0.5 * inside)
    return x.to(torch.float64) + u, log_q.flatten(1).sum(1)

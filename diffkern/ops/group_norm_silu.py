"""GroupNorm (Wu & He 2018) followed by SiLU, the pair in front of every convolution of a diffusion UNet and VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.op import Cost, Sample, op
from diffkern.ops.layout import accumulate, memory_format


@op
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """silu(group_norm(x)), or without the SiLU.

    x: [B, C, ...], contiguous or channels_last. weight, bias: [C] or None. C is a multiple of num_groups.
    Returns the shape, dtype and layout of x. Raises RuntimeError if num_groups does not divide C."""
    acc = accumulate(x.dtype)
    weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
    y = F.group_norm(x.to(acc), num_groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))

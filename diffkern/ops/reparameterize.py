"""The reparameterisation trick (Kingma & Welling 2013, section 2.4): a draw from N(mean, exp(logvar)) that gradients of
mean and logvar pass through."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.op import Cost, Sample, op
from diffkern.ops.layout import accumulate, memory_format
from diffkern.ops.randn import Draw, normal


@op
def reparameterize(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int = int(Draw.VAE)) -> Tensor:
    """z = mean + exp(logvar / 2) epsilon, with epsilon = randn(keys, mean.shape[1:], draw).

    mean, logvar: [B, ...], same shape and dtype. keys: int64 [B, 2]. Returns the shape, dtype and layout of mean."""
    acc = accumulate(mean.dtype)
    noise = normal(keys, mean.shape[1:], draw, acc)
    z = mean.to(acc) + torch.exp(logvar.to(acc) / 2) * noise
    return z.to(mean.dtype).contiguous(memory_format=memory_format(mean))

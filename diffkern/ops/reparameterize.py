"""The reparameterisation trick (Kingma & Welling 2013, section 2.4): a draw from N(mean, exp(logvar)) that gradients of
mean and logvar pass through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffkern.check import alike, batched, integers
from diffkern.layout import accumulate, fast_dtype, memory_format
from diffkern.op import Cost, Sample, for_gpu, op
from diffkern.ops.randn import Draw, noise_keys, normal, randn


@op
def reparameterize(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int = int(Draw.VAE)) -> Tensor:
    """z = mean + exp(logvar / 2) epsilon, with epsilon = randn(keys, mean.shape[1:], draw).

    mean, logvar: [B, ...], same shape and dtype. keys: int64 [B, 2]. Returns the shape, dtype and layout of mean."""
    acc = accumulate(mean.dtype)
    noise = normal(keys, mean.shape[1:], draw, acc)
    z = mean.to(acc) + torch.exp(logvar.to(acc) / 2) * noise
    return z.to(mean.dtype).contiguous(memory_format=memory_format(mean))


class _Gradient(torch.autograd.Function):
    """dz/dmean = 1, dz/dlogvar = exp(logvar / 2) epsilon / 2. The noise is a counter, so it is drawn again rather than
    kept; (z - mean) / 2 would need no noise but has no digits left where the spread is small beside the mean."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Tensor:
        ctx.save_for_backward(logvar, keys)
        ctx.draw = draw
        return reparameterize.overload(mean.detach(), logvar.detach(), keys, draw)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logvar, keys = ctx.saved_tensors
        acc = accumulate(logvar.dtype)
        noise = randn.overload(keys, list(logvar.shape[1:]), ctx.draw, acc, 0)
        return grad, (grad.to(acc) * torch.exp(logvar.to(acc) / 2) * noise / 2).to(logvar.dtype), None, None


reparameterize.gradient(_Gradient)


def _supports(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> bool | str:
    if logvar.dtype != mean.dtype:
        return "takes mean and logvar of one dtype"
    return fast_dtype(mean.dtype)


@reparameterize.checks
def _(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> None:
    batch = batched("reparameterize", "mean", mean)
    integers("reparameterize", "keys", keys, batch, 2)
    alike("reparameterize", "logvar", logvar, mean, batch)


@reparameterize.backend("cuda", devices=("cuda",), supports=_supports)
def _(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Tensor:
    return torch.ops.diffkern_CUDA.reparameterize.default(mean, logvar, keys, draw)


@reparameterize.backend("triton", devices=("cuda",), supports=_supports)
def _(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Tensor:
    from diffkern.kernels.reparameterize import reparameterize as kernel

    return kernel(mean, logvar, keys, draw)


@reparameterize.backend("cpu", devices=("cpu",), supports=_supports)
def _(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Tensor:
    return torch.ops.diffkern_C.reparameterize(mean, logvar, keys, draw)


@reparameterize.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import SHAPES, make

    def sample(name: str, shape: tuple[int, ...], layout: str, workload: bool = False) -> Sample:
        def args() -> tuple[object, ...]:
            mean, logvar = (make(shape, device, dtype, layout, seed) for seed in (0, 1))
            return mean, logvar, noise_keys(5, shape[0], device), int(Draw.VAE)

        return Sample(name, args, workload)

    for name, shape, layout in SHAPES:
        yield sample(name, shape, layout)
    yield sample("SD 1.5 VAE latents", (16, 4, 64, 64), "contiguous", workload=True)
    yield sample("SDXL VAE latents", (16, 4, 128, 128), "contiguous", workload=True)
    yield for_gpu(sample("SDXL VAE latents, 256", (256, 4, 128, 128), "contiguous"))


@reparameterize.cost
def _(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Cost:
    return Cost(bytes=3 * mean.numel() * mean.element_size(), flops=30 * mean.numel())

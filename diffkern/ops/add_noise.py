"""The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) (Ho et al. 2020, eq. 4; Kingma et al. 2021, eq. 1),
with the schedule looked up and the noise drawn inside the op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffkern.check import batched, integers, rows_known, unfit
from diffkern.layout import accumulate, fast_dtype, memory_format, per_sample, rows_of
from diffkern.op import Cost, Sample, for_gpu, op
from diffkern.ops.randn import Draw, noise_keys, normal


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
    Returns (x_t, epsilon), both with the shape, dtype and layout of x0; epsilon is empty unless return_noise. Raises
    RuntimeError for a timestep on the CPU that is no row; on a GPU, where only the device knows it, x_t of that sample
    is NaN."""
    acc, layout = accumulate(x0.dtype), memory_format(x0)
    alpha, sigma = rows_of(alpha_sigma, timestep).to(acc).unbind(-1)
    noise = normal(keys, x0.shape[1:], draw, acc)
    x_t = per_sample(alpha, x0) * x0.to(acc) + per_sample(sigma, x0) * noise
    x_t = x_t.to(x0.dtype).contiguous(memory_format=layout)
    return x_t, noise.to(x0.dtype).contiguous(memory_format=layout) if return_noise else x0.new_empty(0)


@add_noise.checks
def _(x0: Tensor, timestep: Tensor, alpha_sigma: Tensor, keys: Tensor, draw: int, return_noise: bool) -> None:
    batch = batched("add_noise", "x0", x0)
    if alpha_sigma.dim() != 2 or alpha_sigma.shape[1] != 2:
        unfit("add_noise", "alpha_sigma", "[T, 2]", alpha_sigma.shape)
    integers("add_noise", "keys", keys, batch, 2)
    integers("add_noise", "timestep", timestep, batch)
    rows_known("add_noise", "timestep", timestep, len(alpha_sigma))


def _supports(
    x0: Tensor, timestep: Tensor, alpha_sigma: Tensor, keys: Tensor, draw: int, return_noise: bool
) -> bool | str:
    if alpha_sigma.dtype != torch.float32:
        return "takes a float32 alpha_sigma"
    return fast_dtype(x0.dtype)


@add_noise.backend("cuda", devices=("cuda",), supports=_supports)
def _(
    x0: Tensor, timestep: Tensor, alpha_sigma: Tensor, keys: Tensor, draw: int, return_noise: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.diffkern_CUDA.add_noise.default(x0, timestep, alpha_sigma, keys, draw, return_noise)


@add_noise.backend("triton", devices=("cuda",), supports=_supports)
def _(
    x0: Tensor, timestep: Tensor, alpha_sigma: Tensor, keys: Tensor, draw: int, return_noise: bool
) -> tuple[Tensor, Tensor]:
    from diffkern.kernels.add_noise import add_noise as kernel

    return kernel(x0, timestep, alpha_sigma, keys, draw, return_noise)


@add_noise.backend("cpu", devices=("cpu",), supports=_supports)
def _(
    x0: Tensor, timestep: Tensor, alpha_sigma: Tensor, keys: Tensor, draw: int, return_noise: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.diffkern_C.add_noise(x0, timestep, alpha_sigma, keys, draw, return_noise)


@add_noise.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import SHAPES, make

    angle = torch.linspace(0.01, 1.56, 1000, dtype=torch.float64)
    acc = accumulate(dtype)
    table = torch.stack([angle.cos(), angle.sin()], dim=1).to(device, acc)

    def sample(name: str, shape: tuple[int, ...], layout: str, noise: bool, workload: bool = False) -> Sample:
        def args() -> tuple[object, ...]:
            timestep = torch.arange(shape[0], device=device) * 131 % 1000
            keys = noise_keys(3, shape[0], device)
            return make(shape, device, dtype, layout), timestep, table, keys, int(Draw.TRAINING), noise

        return Sample(name, args, workload)

    for name, shape, layout in SHAPES:
        yield sample(name, shape, layout, noise=False)
    yield sample("with the noise", (3, 4, 9, 9), "channels_last", noise=True)
    yield sample("CIFAR training batch", (128, 3, 32, 32), "contiguous", noise=True, workload=True)
    yield sample("SDXL latents", (16, 4, 128, 128), "contiguous", noise=False, workload=True)
    yield sample("SD 1.5 VAE pictures", (16, 3, 512, 512), "contiguous", noise=False, workload=True)
    yield for_gpu(sample("SDXL training batch", (256, 4, 128, 128), "contiguous", noise=True))
    yield for_gpu(sample("SD 1.5 VAE pictures, 64", (64, 3, 512, 512), "contiguous", noise=False))


@add_noise.cost
def _(x0: Tensor, timestep: Tensor, alpha_sigma: Tensor, keys: Tensor, draw: int, return_noise: bool) -> Cost:
    return Cost(bytes=x0.numel() * x0.element_size() * (3 if return_noise else 2), flops=29 * x0.numel())

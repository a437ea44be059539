"""The gradient of layer_norm_modulate, in closed form: an op of its own, so that it too has kernels behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffkern.check import alike, shaped, unfit
from diffkern.layout import accumulate, fast_dtype
from diffkern.op import Cost, Sample, op


@op
def layer_norm_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None = None, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """With n = layer_norm(x) and y = n * weight * (1 + scale) + a constant: the gradient of x from that of y, and what
    those of the parameters are made of.

    grad, x: [B, T, C]. scale: [B, C] or None. weight: [C] or None. Returns (grad_x [B, T, C], dtype of x; the sums over
    the tokens of grad and of grad * n, both [B, C] in float32)."""
    acc = accumulate(x.dtype)
    g, centred = grad.to(acc), x.to(acc) - x.to(acc).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n = centred * rstd
    d = g if weight is None else g * weight.to(acc)
    d = d if scale is None else d * (1 + scale.to(acc)[:, None])
    grad_x = rstd * (d - d.mean(-1, keepdim=True) - n * (d * n).mean(-1, keepdim=True))
    return grad_x.to(x.dtype).contiguous(), g.sum(1), (g * n).sum(1)


@layer_norm_modulate_backward.checks
def _(grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float) -> None:
    op = "layer_norm_modulate_backward"
    if x.dim() != 3:
        unfit(op, "x", "contiguous [B, T, C]", x.shape)
    batch, _, channels = x.shape
    shaped(op, "weight", weight, channels)
    shaped(op, "scale", scale, batch, channels)
    alike(op, "grad", grad, x, batch)


def _supports(grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float) -> bool | str:
    if grad.dtype != x.dtype or any(p is not None and p.dtype not in (x.dtype, torch.float32) for p in (scale, weight)):
        return "takes grad in the dtype of x, and scale and weight in that or float32"
    return fast_dtype(x.dtype)


def _supports_triton(grad: Tensor, x: Tensor, *args: Any) -> bool | str:
    return "takes at most 16384 channels" if x.shape[-1] > 16384 else _supports(grad, x, *args)


# Measured on an H200 in bfloat16, beside PyTorch's autograd of a layer norm and its modulation, for 32 x 256 x 384 and
# 4 x 256 x 1152 numbers: launched call by call, as training does, 105 and 108 us where that takes 143 and 189; in a
# graph 39 and 53 where that takes 33 and 20. It is first for the former. That was in chunks of 32 tokens; the shorter
# ones that the kernel has now have not run on a GPU.
@layer_norm_modulate_backward.backend("triton", devices=("cuda",), supports=_supports_triton)
def _(
    grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from diffkern.kernels.layer_norm_modulate_backward import layer_norm_modulate_backward as kernel

    return kernel(grad, x, scale, weight, eps)


@layer_norm_modulate_backward.backend("cpu", devices=("cpu",), supports=_supports)
def _(
    grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.diffkern_C.layer_norm_modulate_backward(grad, x, scale, weight, eps)


@layer_norm_modulate_backward.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(name: str, shape: tuple[int, int, int], modulated: bool, affine: bool, workload: bool = False) -> Sample:
        def args() -> tuple[object, ...]:
            grad, x = (make(shape, device, dtype, seed=s) for s in (0, 1))
            scale = make(shape[::2], device, dtype, seed=2) if modulated else None
            return grad, x, scale, make(shape[2:], device, dtype, seed=3) if affine else None, 1e-6

        return Sample(name, args, workload)

    for name, shape in (
        ("a transformer block", (3, 5, 32)),
        ("odd", (2, 7, 37)),
        ("one channel a row", (2, 3, 1)),
        ("several chunks of tokens", (2, 70, 24)),
        ("more chunks than are added at once", (1, 133, 2064)),
        ("no sample", (0, 4, 8)),
        ("no token", (2, 0, 8)),
    ):
        yield sample(name, shape, modulated=True, affine=False)
        yield sample(f"{name}, affine", shape, modulated=False, affine=True)
    yield sample("bare", (2, 5, 24), modulated=False, affine=False)
    yield sample("DiT-S/2 256x256 training", (32, 256, 384), modulated=True, affine=False, workload=True)
    yield sample("DiT-XL/2 256x256 training", (4, 256, 1152), modulated=True, affine=False, workload=True)
    yield sample("everything", (2, 6, 40), modulated=True, affine=True)


@layer_norm_modulate_backward.cost
def _(grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float) -> Cost:
    sums = 2 * x.shape[0] * x.shape[2]
    return Cost(bytes=3 * x.numel() * x.element_size() + 4 * sums, flops=16 * x.numel())

"""LayerNorm (Ba et al. 2016) and the modulation of adaLN (DiT, Peebles & Xie 2023), in front of every attention and MLP
of a diffusion transformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import shaped, together, unfit
from diffkern.layout import accumulate, fast_dtype
from diffkern.op import Cost, Sample, for_gpu, op
from diffkern.ops.layer_norm_modulate_backward import layer_norm_modulate_backward


@op
def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """(layer_norm(x) * weight + bias) * (1 + scale) + shift.

    x: [B, T, C]. shift, scale: [B, C], given together or neither. weight, bias: [C] or None.
    Returns the shape and dtype of x, contiguous. Raises RuntimeError for one of shift and scale."""
    acc = accumulate(x.dtype)
    weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
    y = F.layer_norm(x.to(acc), x.shape[-1:], weight, bias, eps)
    if shift is not None and scale is not None:
        y = y * (1 + scale.to(acc)[:, None]) + shift.to(acc)[:, None]
    return y.to(x.dtype).contiguous()


def check_norm(
    op: str, x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    """What is asked of the norm's arguments, wherever it is a part."""
    if x.dim() != 3:
        unfit(op, "x", "contiguous [B, T, C]", x.shape)
    batch, _, channels = x.shape
    together(op, shift=shift, scale=scale)
    for name, p in (("weight", weight), ("bias", bias)):
        shaped(op, name, p, channels)
    for name, p in (("shift", shift), ("scale", scale)):
        shaped(op, name, p, batch, channels)


@layer_norm_modulate.checks
def _(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    check_norm("layer_norm_modulate", x, shift, scale, weight, bias)


def gradients(
    grad: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of x, shift, scale, weight and bias; None for what is None. All of the parameters' follow from two sums
    over a sample's tokens."""
    grad_x, grad_shift, along_normal = layer_norm_modulate_backward(grad, x, scale, weight, eps)
    grad_scale = along_normal if weight is None else along_normal * weight
    if bias is not None:
        grad_scale = grad_scale + grad_shift * bias
    factor = 1 if scale is None else 1 + scale.to(grad_shift.dtype)
    return (
        grad_x,
        None if shift is None else grad_shift.to(shift.dtype),
        None if scale is None else grad_scale.to(scale.dtype),
        None if weight is None else (along_normal * factor).sum(0).to(weight.dtype),
        None if bias is None else (grad_shift * factor).sum(0).to(bias.dtype),
    )


class _Gradient(torch.autograd.Function):
    """The moments are taken again: the row is in the cache anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, shift, scale, weight, bias)
        ctx.eps = eps
        given = (None if t is None else t.detach() for t in (x, shift, scale, weight, bias))
        return layer_norm_modulate.overload(*given, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, weight, bias = ctx.saved_tensors
        return *gradients(grad, x, shift, scale, weight, bias, ctx.eps), None


layer_norm_modulate.gradient(_Gradient)

# Channels of a row that the kernels keep in registers.
_WIDEST = 16384
_WIDEST_IN_CUDA = 8192


def why_not(x: Tensor, *parameters: Tensor | None) -> bool | str:
    """What a kernel takes: True or the reason why not. Shared with the op that adds a residual first."""
    for p in parameters:  # a generator would take twice the time
        if p is not None and p.dtype is not x.dtype and p.dtype is not torch.float32:
            return "takes shift, scale, weight and bias in float32 or the dtype of x"
    return fast_dtype(x.dtype)


def why_not_on_gpu(x: Tensor, *parameters: Tensor | None, widest: int = _WIDEST) -> bool | str:
    if x.shape[-1] > widest:
        return f"takes at most {widest} channels"
    return why_not(x, *parameters)


def why_not_in_cuda(x: Tensor, *parameters: Tensor | None) -> bool | str:
    return why_not_on_gpu(x, *parameters, widest=_WIDEST_IN_CUDA)


def defers_to_triton(x: Tensor, *args: Any) -> str | None:
    """Measured on an H200, in graphs, in bfloat16, with 8 samples: for 256 x 384 numbers each the CUDA kernel takes 2.4
    us and Triton's 2.9, with a residual 3.2 and 3.6; for 256 x 1152 5.1 and 4.8, 6.4 and 5.6; for more it never wins by
    more than the noise. The batch has no say: it must not change a sample's bits."""
    return "Triton is faster for more than 2^17 numbers a sample" if x.shape[1:].numel() > 1 << 17 else None


def _supports_cuda(x: Tensor, *args: Any) -> bool | str:
    fits = why_not_in_cuda(x)
    return _supports_triton(x, *args) if fits is True else fits


def _supports_triton(x: Tensor, *args: Any) -> bool | str:
    return why_not_on_gpu(x, *args[:-1])


@layer_norm_modulate.backend("cuda", devices=("cuda",), supports=_supports_cuda, defers=defers_to_triton)
def _(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return torch.ops.diffkern_CUDA.layer_norm_modulate(x, shift, scale, weight, bias, eps)


@layer_norm_modulate.backend("triton", devices=("cuda",), supports=_supports_triton)
def _(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    from diffkern.kernels.layer_norm_modulate import layer_norm_modulate as kernel

    return kernel(x, shift, scale, weight, bias, eps)


@layer_norm_modulate.backend("cpu", devices=("cpu",), supports=lambda x, *args: why_not(x, *args[:-1]))
def _(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return torch.ops.diffkern_C.layer_norm_modulate(x, shift, scale, weight, bias, eps)


SHAPES = (
    ("a transformer block", (3, 5, 32)),
    ("odd", (2, 7, 37)),
    ("one channel a row", (2, 3, 1)),
    ("one token", (3, 1, 48)),
    ("several rows a program, the last few missing", (2, 19, 16)),
    ("a wide row", (2, 3, 1153)),
    ("no sample", (0, 4, 8)),
    ("no token", (2, 0, 8)),
)
"""Small (name, [B, T, C]) that the norms of a transformer are tried on."""

WORKLOADS = (
    ("DiT-S/2 256x256", (8, 256, 384)),
    ("DiT-XL/2 256x256", (8, 256, 1152)),
    ("DiT-XL/2 512x512", (2, 1024, 1152)),
    ("FLUX.1 1024x1024", (1, 4608, 3072)),
)
"""Realistic (model, [B, T, C])."""


@layer_norm_modulate.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, int, int], modulated: bool, affine: bool, layout: str = "contiguous",
        offset: float = 0.0, workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            x = make(shape, device, dtype, layout) + offset
            shift, scale = (make(shape[::2], device, dtype, seed=s) if modulated else None for s in (1, 2))
            weight, bias = (make(shape[2:], device, dtype, seed=s) if affine else None for s in (3, 4))
            return x, shift, scale, weight, bias, 1e-6

        return Sample(name, args, workload)

    for name, shape in SHAPES:
        yield sample(name, shape, modulated=True, affine=False)
        yield sample(f"{name}, affine", shape, modulated=False, affine=True)
    yield sample("bare", (2, 5, 24), modulated=False, affine=False)
    yield sample("strided", (2, 5, 24), modulated=True, affine=False, layout="strided")
    # The mean is 200 times the spread: E[x^2] - E[x]^2 in float32 would lose every digit here.
    yield sample("far from zero", (2, 6, 72), modulated=True, affine=False, offset=200.0)
    for name, shape in WORKLOADS:
        yield sample(name, shape, modulated=True, affine=False, workload=True)
    yield sample("everything", (2, 6, 40), modulated=True, affine=True)
    yield for_gpu(sample("DiT-XL/2 256x256, 32 pictures", (32, 256, 1152), modulated=True, affine=False))
    yield for_gpu(sample("SDXL UNet 64x64", (2, 4096, 640), modulated=False, affine=True))
    yield for_gpu(sample("FLUX.1 1024x1024, 4 pictures", (4, 4608, 3072), modulated=True, affine=False))


@layer_norm_modulate.cost
def _(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Cost:
    vectors = sum(t.numel() for t in (shift, scale, weight, bias) if t is not None)
    return Cost(bytes=(2 * x.numel() + vectors) * x.element_size(), flops=9 * x.numel())

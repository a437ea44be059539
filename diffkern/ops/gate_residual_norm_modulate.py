"""What stands between two layers of a DiT block (Peebles & Xie 2023, figure 3): a layer's output, gated, joins the
residual stream, which is normalised and modulated for the next layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffkern.check import alike, shaped
from diffkern.layout import accumulate
from diffkern.op import Cost, Sample, for_gpu, op
from diffkern.ops.layer_norm_modulate import (
    SHAPES,
    WORKLOADS,
    check_norm,
    defers_to_triton,
    gradients,
    layer_norm_modulate,
    why_not,
    why_not_in_cuda,
    why_not_on_gpu,
)


@op
def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """r = x + gate * y, and (layer_norm(r) * weight + bias) * (1 + scale) + shift of it before it is rounded.

    x, y: [B, T, C], one dtype. gate, shift, scale: [B, C]. weight, bias: [C] or None.
    Returns (r, the normalised), both with the shape and dtype of x, contiguous."""
    acc = accumulate(x.dtype)
    r = x.to(acc) + gate.to(acc)[:, None] * y.to(acc)
    normal = layer_norm_modulate.reference(r, shift, scale, weight, bias, eps)
    return r.to(x.dtype).contiguous(), normal.to(x.dtype)


@gate_residual_norm_modulate.checks
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    op = "gate_residual_norm_modulate"
    check_norm(op, x, shift, scale, weight, bias)
    shaped(op, "gate", gate, x.shape[0], x.shape[-1])
    alike(op, "y", y, x, x.shape[0])


class _Gradient(torch.autograd.Function):
    """The gradient of r is its own and what comes through the norm; x, y and gate follow from it. The norm's is taken
    at r as it was returned, so that no float32 copy of the stream is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None,
        bias: Tensor | None, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        given = (None if t is None else t.detach() for t in (x, y, gate, shift, scale, weight, bias))
        r, normal = gate_residual_norm_modulate.overload(*given, eps)
        ctx.save_for_backward(r, y, gate, shift, scale, weight, bias)
        ctx.eps = eps
        return r, normal

    @staticmethod
    def backward(ctx: Any, grad_r: Tensor, grad_normal: Tensor) -> tuple[Tensor | None, ...]:
        r, y, gate, shift, scale, weight, bias = ctx.saved_tensors
        through, *parameters = gradients(grad_normal, r, shift, scale, weight, bias, ctx.eps)
        acc = accumulate(r.dtype)
        total = grad_r.to(acc) + through.to(acc)
        grad_y, grad_gate = total * gate.to(acc)[:, None], (total * y.to(acc)).sum(1)
        return total.to(r.dtype), grad_y.to(y.dtype), grad_gate.to(gate.dtype), *parameters, None


gate_residual_norm_modulate.gradient(_Gradient)


def _supports_cpu(x: Tensor, y: Tensor, *args: Any) -> bool | str:
    return "takes x and y of one dtype" if x.dtype != y.dtype else why_not(x, *args[:-1])


def _supports_triton(x: Tensor, y: Tensor, *args: Any) -> bool | str:
    return "takes x and y of one dtype" if x.dtype != y.dtype else why_not_on_gpu(x, *args[:-1])


def _supports_cuda(x: Tensor, y: Tensor, *args: Any) -> bool | str:
    return "takes x and y of one dtype" if x.dtype != y.dtype else why_not_in_cuda(x, *args[:-1])


@gate_residual_norm_modulate.backend("cuda", devices=("cuda",), supports=_supports_cuda, defers=defers_to_triton)
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.ops.diffkern_CUDA.gate_residual_norm_modulate(x, y, gate, shift, scale, weight, bias, eps)


@gate_residual_norm_modulate.backend("triton", devices=("cuda",), supports=_supports_triton)
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from diffkern.kernels.layer_norm_modulate import gate_residual_norm_modulate as kernel

    return kernel(x, y, gate, shift, scale, weight, bias, eps)


@gate_residual_norm_modulate.backend("cpu", devices=("cpu",), supports=_supports_cpu)
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.ops.diffkern_C.gate_residual_norm_modulate(x, y, gate, shift, scale, weight, bias, eps)


@gate_residual_norm_modulate.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, int, int], affine: bool = False, layout: str = "contiguous", offset: float = 0.0,
        workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            x, y = make(shape, device, dtype, layout) + offset, make(shape, device, dtype, layout, seed=1)
            gate, shift, scale = (make(shape[::2], device, dtype, seed=s) for s in (2, 3, 4))
            weight, bias = (make(shape[2:], device, dtype, seed=s) if affine else None for s in (5, 6))
            return x, y, gate, shift, scale, weight, bias, 1e-6

        return Sample(name, args, workload)

    for name, shape in SHAPES:
        yield sample(name, shape)
    yield sample("strided", (2, 5, 24), layout="strided")
    # The mean is 200 times the spread: E[r^2] - E[r]^2 in float32 would lose every digit here.
    yield sample("far from zero", (2, 6, 72), offset=200.0)
    for name, shape in WORKLOADS:
        yield sample(name, shape, workload=True)
    yield sample("affine", (2, 6, 40), affine=True)
    yield for_gpu(sample("DiT-XL/2 256x256, 32 pictures", (32, 256, 1152)))
    yield for_gpu(sample("FLUX.1 1024x1024, 4 pictures", (4, 4608, 3072)))


@gate_residual_norm_modulate.cost
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> Cost:  # fmt: skip
    vectors = sum(t.numel() for t in (gate, shift, scale, weight, bias) if t is not None)
    return Cost(bytes=(4 * x.numel() + vectors) * x.element_size(), flops=11 * x.numel())

"""The gradient of group_norm_silu: what its autograd.Function runs, and an op like any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import refuse, shaped, together, unfit
from diffkern.layout import accumulate, memory_format, per_channel
from diffkern.op import Cost, Sample, op


@op
def group_norm_silu_backward(
    x: Tensor,
    grad: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """grad: [B, C, ...], the gradient of group_norm_silu's result; the other arguments are those of that call.

    Returns (dx, sums). dx: [B, C, ...], the gradient of cat(x, skip), dtype and layout of x. sums: [B, 3, C], float32,
    over the pixels: of dx (the gradient of `add`); of the gradient of what the SiLU takes (of `shift`); of that times
    the normalised values. The gradients of weight, bias and scale are made of the last two. Raises RuntimeError as
    group_norm_silu does, and if grad has another shape or dtype than its result."""
    acc = accumulate(x.dtype)
    u = (x if skip is None else torch.cat([x, skip], dim=1)).to(acc)
    if add is not None:
        u = u + per_channel(add.to(acc), u)
    batch, channels = u.shape[:2]
    group = (batch, num_groups, u.numel() // max(1, batch * num_groups))
    gamma = torch.ones(1, channels, dtype=acc, device=x.device) if weight is None else weight.to(acc)[None]
    beta = torch.zeros_like(gamma) if bias is None else bias.to(acc)[None]
    if scale is not None and shift is not None:
        gamma, beta = gamma * (1 + scale.to(acc)), beta * (1 + scale.to(acc)) + shift.to(acc)
    gamma, beta = per_channel(gamma, u), per_channel(beta, u)

    normal = F.group_norm(u, num_groups, eps=eps)
    slope = grad.to(acc)
    if silu:
        z = normal * gamma + beta
        slope = slope * torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z)))

    def group_mean(v: Tensor) -> Tensor:
        mean = v.reshape(group).mean(-1, keepdim=True).expand(-1, -1, channels // num_groups)
        return per_channel(mean.reshape(batch, channels), u)

    d = slope * gamma
    deviation = (group_mean((u - group_mean(u)).square()) + eps).sqrt()
    dx = (d - group_mean(d) - normal * group_mean(d * normal)) / deviation
    sums = [v.flatten(2).sum(-1) if v.dim() > 2 else v for v in (dx, slope, slope * normal)]
    return dx.to(x.dtype).contiguous(memory_format=memory_format(x)), torch.stack(sums, dim=1)


def _supports(x: Tensor, grad: Tensor, num_groups: int, *rest: Any) -> bool | str:
    from diffkern.ops.group_norm_silu import supports

    return supports(x, num_groups, *rest) if grad.dtype is x.dtype else "takes grad in the dtype of x"


@group_norm_silu_backward.backend("cpu", devices=("cpu",), supports=_supports)
def _(x: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.diffkern_C.group_norm_silu_backward(x, grad, *rest)


def check_group_norm(
    op: str, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, add: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, skip: Tensor | None,
) -> list[int]:  # fmt: skip
    """What is asked of the arguments of the norm and of its gradient. Returns the shape of the norm's result."""
    if x.dim() < 2:
        unfit(op, "x", "[B, C, ...]", x.shape)
    batch, channels, *pixels = x.shape
    if skip is not None:
        if skip.dim() != x.dim() or skip.shape != (batch, skip.shape[1], *pixels) or skip.dtype != x.dtype:
            must_be = f"the dtype and, but for the channels, the shape of x, {list(x.shape)}"
            refuse(op, f"skip must have {must_be}, got {list(skip.shape)}")
        channels += skip.shape[1]
    if num_groups < 1 or channels % num_groups:
        refuse(op, f"num_groups is {num_groups}, allowed are the divisors of the {channels} channels")
    for name, p in (("weight", weight), ("bias", bias)):
        shaped(op, name, p, channels)
    for name, p in (("scale", scale), ("shift", shift), ("add", add)):
        shaped(op, name, p, batch, channels)
    together(op, scale=scale, shift=shift)
    return [batch, channels, *pixels]


@group_norm_silu_backward.checks
def _(
    x: Tensor, grad: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    add: Tensor | None, scale: Tensor | None, shift: Tensor | None, skip: Tensor | None,
) -> None:  # fmt: skip
    op = "group_norm_silu_backward"
    shape = check_group_norm(op, x, num_groups, weight, bias, add, scale, shift, skip)
    if list(grad.shape) != shape:
        refuse(op, f"grad must have batch {shape[0]} and otherwise the shape {shape}, got {list(grad.shape)}")


@group_norm_silu_backward.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.ops.group_norm_silu import group_norm_silu
    from diffkern.testing import make

    def backward(sample: Sample) -> Sample:
        def args() -> tuple[Any, ...]:
            x, *rest = sample.args()[:-2]  # without moments
            skip = rest[-1]
            shape = x.shape if skip is None else (x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:])
            layout = "channels_last" if memory_format(x) is torch.channels_last else "contiguous"
            return x, make(tuple(shape), device, dtype, layout, seed=7), *rest

        return Sample(sample.name, args, sample.workload)

    samples = group_norm_silu.make_samples(device, dtype)
    yield from (backward(sample) for sample in samples if not sample.name.startswith("moments"))


@group_norm_silu_backward.cost
def _(x: Tensor, grad: Tensor, num_groups: int, *rest: Any) -> Cost:
    silu: bool = rest[3]
    return Cost(bytes=3 * grad.numel() * grad.element_size(), flops=(25 if silu else 15) * grad.numel())

"""GroupNorm (Wu & He 2018) followed by SiLU, the pair in front of every convolution of a diffusion UNet and VAE."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.layout import accumulate, fast_dtype, memory_format
from diffkern.op import Cost, Sample, op


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


def _supports(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> bool | str:
    if (weight is None) != (bias is None):
        return "takes weight and bias together or neither"
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return "takes weight and bias in float32 or the dtype of x"
    return fast_dtype(x.dtype)


@group_norm_silu.backend("triton", devices=("cuda",), supports=_supports)
def _(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    from diffkern.kernels.group_norm_silu import group_norm_silu as kernel

    return kernel(x, num_groups, weight, bias, eps, silu)


@group_norm_silu.backend("cpu", devices=("cpu",), supports=_supports)
def _(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    return torch.ops.diffkern_C.group_norm_silu(x, num_groups, weight, bias, eps, silu)


@group_norm_silu.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, ...], groups: int, layout: str, affine: bool = True, silu: bool = True,
        shift: float = 0.0, workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            weight, bias = (make(shape[1:2], device, dtype, seed=s) if affine else None for s in (1, 2))
            return make(shape, device, dtype, layout) + shift, groups, weight, bias, 1e-5, silu

        return Sample(name, args, workload)

    for layout in ("contiguous", "channels_last", "strided"):
        yield sample(f"a UNet level, {layout}", (2, 32, 8, 8), 8, layout)
        yield sample(f"odd, {layout}", (3, 15, 7, 5), 5, layout, silu=False)
        yield sample(f"one channel a group, {layout}", (2, 6, 5, 5), 6, layout)
    yield sample("one group", (2, 10, 4, 4), 1, "channels_last", affine=False)
    yield sample("40 channels a group", (1, 1280, 3, 3), 32, "channels_last")
    yield sample("one pixel", (2, 8, 1, 1), 2, "contiguous")
    yield sample("no sample", (0, 8, 4, 4), 2, "contiguous")
    yield sample("no spatial axis", (3, 12), 4, "contiguous")
    yield sample("a sequence", (2, 12, 31), 4, "contiguous")
    # The mean is 200 times the spread: E[x^2] - E[x]^2 in float32 would lose every digit here.
    yield sample("far from zero", (2, 16, 16, 16), 4, "channels_last", shift=200.0)
    for layout in ("contiguous", "channels_last"):  # too large for one pass over registers
        yield sample(f"a large group, {layout}", (1, 18, 45, 41), 2, layout)
        yield sample(f"a wide group, {layout}", (1, 264, 9, 11), 1, layout)
    for layout in ("contiguous", "channels_last"):
        yield sample(f"CIFAR UNet 16x16, {layout}", (8, 256, 16, 16), 32, layout, workload=True)
        yield sample(f"SD 1.5 UNet 16x16, {layout}", (2, 1280, 16, 16), 32, layout, workload=True)
        yield sample(f"SD 1.5 UNet 64x64, {layout}", (2, 320, 64, 64), 32, layout, workload=True)
        yield sample(f"SD 1.5 VAE 256x256, {layout}", (1, 256, 256, 256), 32, layout, workload=True)


@group_norm_silu.cost
def _(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size(), flops=(9 if silu else 5) * x.numel())

"""GroupNorm (Wu & He 2018) followed by SiLU, the pair in front of every convolution of a diffusion UNet and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import refuse, shaped, unfit
from diffkern.layout import accumulate, fast_dtype, memory_format, per_channel
from diffkern.op import Cost, Sample, for_gpu, op
from diffkern.ops.group_norm_silu_backward import check_group_norm, group_norm_silu_backward


@op
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    silu: bool = True,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    moments: Tensor | None = None,
    skip_moments: Tensor | None = None,
) -> Tensor:
    """silu(group_norm(cat(x, skip) + add) * (1 + scale) + shift), each part left out if not given.

    x: [B, C1, ...], contiguous or channels_last. skip: [B, C2, ...], what a UNet joins to it; C = C1 + C2 is a multiple
    of num_groups. weight, bias: [C]. add: [B, C], such as a time embedding. scale, shift: [B, C], given together
    (Dhariwal & Nichol 2021). moments: [B, chunks, 2 C1], those of x as `conv2d_moments` gives them, and skip_moments,
    [B, chunks, 2 C2], those of skip: they change nothing, but a kernel then reads its input once. Returns [B, C, ...]
    with the dtype and layout of x. Raises RuntimeError if num_groups does not divide C or a shape is another."""
    acc = accumulate(x.dtype)
    u = x if skip is None else torch.cat([x, skip], dim=1)
    if add is not None:
        u = u.to(acc) + per_channel(add.to(acc), x)
    weight, bias = (None if p is None else p.to(acc) for p in (weight, bias))
    y = F.group_norm(u.to(acc), num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + per_channel(scale.to(acc), x)) + per_channel(shift.to(acc), x)
    y = F.silu(y) if silu else y
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


@group_norm_silu.checks
def _(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    add: Tensor | None, scale: Tensor | None, shift: Tensor | None, skip: Tensor | None, moments: Tensor | None,
    skip_moments: Tensor | None,
) -> None:  # fmt: skip
    check_group_norm("group_norm_silu", x, num_groups, weight, bias, add, scale, shift, skip)
    _check_moments(x, skip, moments, skip_moments)


def _check_moments(x: Tensor, skip: Tensor | None, moments: Tensor | None, skip_moments: Tensor | None) -> None:
    if moments is None and skip_moments is None:
        return
    op = "group_norm_silu"
    if moments is None or (skip is None) != (skip_moments is None):
        refuse(op, "give the moments of x, and of skip if there is one, or none")
    chunks = moments.shape[1] if moments.dim() == 3 else 0
    if not 1 <= chunks <= max(1, x.shape[2:].numel()):
        unfit(op, "moments", f"[{len(x)}, chunks of pixels, {2 * x.shape[1]}]", moments.shape)
    shaped(op, "moments", moments, len(x), chunks, 2 * x.shape[1])
    if skip is not None:
        shaped(op, "skip_moments", skip_moments, len(x), chunks, 2 * skip.shape[1])


def supports(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    add: Tensor | None, scale: Tensor | None, shift: Tensor | None, skip: Tensor | None, moments: Tensor | None = None,
    skip_moments: Tensor | None = None,
) -> bool | str:  # fmt: skip
    """What the kernels of the norm take, and those of its gradient."""
    if (weight is None) != (bias is None) or (scale is None) != (shift is None):
        return "takes weight and bias, and scale and shift, together or neither"
    for p in (weight, bias, add, scale, shift):
        if p is not None and p.dtype is not x.dtype and p.dtype is not torch.float32:
            return "takes parameters in float32 or the dtype of x"
    if skip is not None and skip.dtype is not x.dtype:
        return "takes skip in the dtype of x"
    if any(m is not None and m.dtype is not torch.float32 for m in (moments, skip_moments)):
        return "takes moments in float32"
    return fast_dtype(x.dtype)


_SKIP = 7  # where skip is behind num_groups
_WIDEST = 320  # channels of a group that a block of the CUDA kernels takes


def _supports_cuda(x: Tensor, num_groups: int, *rest: Any) -> bool | str:
    if memory_format(x) is not torch.channels_last:
        return "takes channels_last: Triton is faster on contiguous tensors"
    skip = rest[_SKIP]
    if skip is not None and not skip.is_contiguous(memory_format=torch.channels_last):
        return "takes a skip in the layout of x"
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if num_groups > 0 and channels > _WIDEST * num_groups:
        return f"takes at most {_WIDEST} channels a group"
    return supports(x, num_groups, *rest)


def _defers_cuda(x: Tensor, num_groups: int, *rest: Any) -> str | None:
    """By the table of the architecture; without an entry, on an H200 at 8 x 8 pixels of 1280 channels the two CUDA
    kernels took 7.8 us and Triton's one 4.5 us, and from 32 x 32 pixels on they are 1.3 to 1.6 times as fast as
    Triton's two."""
    from diffkern.kernels.group_norm_blocks import measured

    found = measured(x, num_groups, rest[_SKIP])
    if found is None or found.cuda_block is None:
        return "Triton reads a small picture once" if x.shape[2:].numel() <= 64 else None
    return None if found.cuda_us < found.us else f"Triton took {found.us:g} us where this took {found.cuda_us:g}"


@group_norm_silu.backend("cuda", devices=("cuda",), supports=_supports_cuda, defers=_defers_cuda)
def _(x: Tensor, num_groups: int, *rest: Any) -> Tensor:
    from diffkern.kernels.group_norm_blocks import cuda_block

    block = cuda_block(x, num_groups, rest[_SKIP])
    return torch.ops.diffkern_CUDA.group_norm_silu(x, num_groups, *rest, block)


@group_norm_silu.backend("triton", devices=("cuda",), supports=supports)
def _(x: Tensor, *rest: Any) -> Tensor:
    from diffkern.kernels.group_norm_silu import group_norm_silu as kernel

    return kernel(x, *rest)


@group_norm_silu.backend("cpu", devices=("cpu",), supports=supports)
def _(x: Tensor, *rest: Any) -> Tensor:
    *norm, skip, moments, skip_moments = rest
    _check_moments(x, skip, moments, skip_moments)  # and for no more: the picture is in the cache or it is not
    return torch.ops.diffkern_C.group_norm_silu(x, *norm, skip)


@group_norm_silu.gradient
class GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
                silu: bool, *more: Tensor | None) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, *more[:4])  # the moments are the input's, and have no gradient
        ctx.options = num_groups, eps, silu
        return group_norm_silu(x, num_groups, weight, bias, eps, silu, *more)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, add, scale, shift, skip = ctx.saved_tensors
        num_groups, eps, silu = ctx.options
        more = (add, scale, shift, skip)
        dx, sums = group_norm_silu_backward(x, grad, num_groups, weight, bias, eps, silu, *more)
        added, slope, product = sums.unbind(1)  # per sample and channel

        def like(value: Tensor, p: Tensor | None) -> Tensor | None:
            return None if p is None else value.to(p.dtype)

        factor = 1 if scale is None else 1 + scale.to(sums.dtype)
        dscale = product if weight is None else product * weight + slope * bias
        dskip = None if skip is None else dx[:, x.shape[1] :]
        return (
            dx if skip is None else dx[:, : x.shape[1]],
            None,
            like((product * factor).sum(0), weight),
            like((slope * factor).sum(0), bias),
            None,
            None,
            like(added, add),
            like(dscale, scale),
            like(slope, shift),
            dskip,
            None,
            None,
        )


@group_norm_silu.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.ops.conv2d_moments import moments_of
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, ...], groups: int, layout: str, affine: bool = True, silu: bool = True,
        offset: float = 0.0, skip: int = 0, add: bool = False, modulated: bool = False, workload: bool = False,
        chunks: int = 0,
    ) -> Sample:  # fmt: skip
        """skip: channels of the second input. chunks: that moments are given of, if any."""

        def args() -> tuple[object, ...]:
            batch, own, *space = shape
            weight, bias = (make((own + skip,), device, dtype, seed=s) if affine else None for s in (1, 2))
            added = make((batch, own + skip), device, dtype, seed=3) if add else None
            scale, shift = (make((batch, own + skip), device, dtype, seed=s) if modulated else None for s in (4, 5))
            second = make((batch, skip, *space), device, dtype, layout, seed=6) if skip else None
            x = make(shape, device, dtype, layout) + offset
            moments, of_skip = (moments_of(t, chunks) if chunks and t is not None else None for t in (x, second))
            return x, groups, weight, bias, 1e-5, silu, added, scale, shift, second, moments, of_skip

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
    yield sample("far from zero", (2, 16, 16, 16), 4, "channels_last", offset=200.0)
    for layout in ("contiguous", "channels_last"):  # too large for one pass over registers
        yield sample(f"a large group, {layout}", (1, 18, 45, 41), 2, layout)
        yield sample(f"a wide group, {layout}", (1, 264, 9, 11), 1, layout)
    for layout in ("contiguous", "channels_last"):
        yield sample(f"a time embedding, {layout}", (2, 12, 5, 7), 4, layout, add=True)
        yield sample(f"a scale and a shift, {layout}", (3, 12, 5, 3), 4, layout, modulated=True)
        yield sample(f"a skip inside a group, {layout}", (2, 7, 5, 3), 4, layout, skip=5)
        yield sample(f"all at once, {layout}", (2, 20, 12, 12), 4, layout, skip=12, add=True, modulated=True)
        yield sample(f"all, without affine, {layout}", (2, 1, 3, 3), 2, layout, affine=False, skip=5, add=True,
                     modulated=True)  # fmt: skip
        yield sample(f"a large group with all, {layout}", (1, 11, 45, 41), 2, layout, skip=7, add=True, modulated=True)
    yield sample("a skip without spatial axis", (3, 44), 4, "contiguous", skip=20, add=True)
    # Of what is too large for one pass; the last chunk is short, a group straddles the join, all is far from zero.
    yield sample("moments, far from zero", (2, 18, 45, 41), 2, "channels_last", offset=200.0, chunks=7)
    yield sample("moments of a skip inside a group", (2, 13, 45, 41), 2, "channels_last", skip=9, add=True,
                 modulated=True, chunks=37)  # fmt: skip
    yield sample("moments, contiguous", (2, 5, 61, 67), 1, "contiguous", skip=3, chunks=4)
    yield sample("moments, a wide group", (1, 264, 9, 11), 1, "channels_last", affine=False, chunks=3)
    yield sample("moments of a small picture", (2, 8, 5, 5), 4, "channels_last", chunks=2)
    for layout in ("contiguous", "channels_last"):
        yield sample(f"CIFAR UNet 16x16, {layout}", (8, 256, 16, 16), 32, layout, workload=True)
        yield sample(f"SD 1.5 UNet 16x16, {layout}", (2, 1280, 16, 16), 32, layout, workload=True)
        yield sample(f"SD 1.5 UNet 64x64, {layout}", (2, 320, 64, 64), 32, layout, workload=True)
        yield sample(f"SD 1.5 UNet 64x64, skip, {layout}", (2, 320, 64, 64), 32, layout, skip=320, workload=True)
        yield sample(f"SD 1.5 VAE 256x256, {layout}", (1, 256, 256, 256), 32, layout, workload=True)
    yield sample("emoji UNet 16x16, channels_last", (36, 64, 16, 16), 16, "channels_last", workload=True)
    for name, shape, skip in (
        ("SD 1.5 UNet 32x32", (2, 640, 32, 32), 0),
        ("SD 1.5 UNet 8x8", (2, 1280, 8, 8), 0),
        ("SDXL UNet 128x128", (2, 320, 128, 128), 0),
        ("SDXL UNet 128x128, skip", (2, 640, 128, 128), 320),
        ("SDXL UNet 64x64", (2, 640, 64, 64), 0),
        ("SDXL UNet 32x32", (2, 1280, 32, 32), 0),
        ("CIFAR UNet 32x32, 64 pictures", (64, 128, 32, 32), 0),
        ("SD 1.5 VAE 64x64", (1, 512, 64, 64), 0),
        ("SD 1.5 VAE 512x512", (1, 256, 512, 512), 0),
        ("SDXL VAE 1024x1024", (1, 128, 1024, 1024), 0),
    ):
        yield for_gpu(sample(f"{name}, channels_last", shape, 32, "channels_last", skip=skip))
    yield for_gpu(sample("SD 1.5 VAE 256x256, moments", (1, 256, 256, 256), 32, "channels_last", chunks=1024))


@group_norm_silu.cost
def _(x: Tensor, num_groups: int, *rest: Any) -> Cost:
    silu, skip = rest[3], rest[_SKIP]
    elements = x.numel() + (0 if skip is None else skip.numel())
    return Cost(bytes=2 * elements * x.element_size(), flops=(9 if silu else 5) * elements)

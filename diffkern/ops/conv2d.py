"""The convolution of UNets and VAEs with what follows it: the time embedding, SiLU and the residual; or with
nearest-neighbour upsampling in front of it, as 2 x 2 convolutions of the small picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern import direct, implicit_gemm, taps, winograd
from diffkern.check import shaped, unfit
from diffkern.invariant import apart
from diffkern.layout import accumulate, fast_dtype, memory_format, of_one_dtype
from diffkern.op import Backend, Cost, Sample, for_gpu, op
from diffkern.ops.linear import activate


def _sides(padding: Sequence[int] | None, weight: Tensor) -> tuple[int, int, int, int]:
    """Padding as F.pad takes it: left, right, top, bottom."""
    if padding is None:
        _, _, height, width = weight.shape
        return width // 2, width // 2, height // 2, height // 2
    left, right, top, bottom = padding if len(padding) == 4 else (padding[0],) * 4
    return left, right, top, bottom


@op
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Sequence[int] | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    upsample: bool = False,
) -> Tensor:
    """activation(conv2d(x) + bias + add) + residual, rounded once.

    x: [B, C, H, W], contiguous or channels_last. weight: [N, C, R, S]. bias: [N] or None. padding, with zeros: one
    number, four for the left, right, top and bottom, or None for half the kernel. upsample: H and W are doubled first,
    by repeating pixels. add: [B, N] or None, one row a sample, such as a time embedding. residual: [B, N, H', W'] or
    None. activation: "none" or "silu". Returns [B, N, H', W'], dtype and layout of x."""
    acc = accumulate(x.dtype)
    bias, add, residual = (None if t is None else t.to(acc) for t in (bias, add, residual))
    y = _convolve(x.to(acc), weight.to(acc), bias, stride, padding, add, residual, activation, upsample)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool,
) -> Tensor:  # fmt: skip
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    left, right, top, bottom = sides = _sides(padding, weight)
    if left != right or top != bottom:
        x, left, top = F.pad(x, sides), 0, 0
    y = F.conv2d(x, weight, bias, stride, (top, left))
    y = activate(y if add is None else y + add[:, :, None, None], activation)
    return y if residual is None else y + residual


def _one_dtype(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool,
) -> bool | str:  # fmt: skip
    return of_one_dtype(x, weight, bias, add, residual)


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool,
) -> bool | str:  # fmt: skip
    same = of_one_dtype(x, weight, bias, add, residual)
    return fast_dtype(x.dtype) if same is True else same


def check_conv2d(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None,
    add: Tensor | None, residual: Tensor | None, activation: str, upsample: bool,
) -> list[int]:  # fmt: skip
    """The shape of the result. Raises RuntimeError with a sentence if the arguments do not fit together."""
    if x.dim() != 4:
        unfit(op, "x", "[B, C, H, W]", x.shape)
    batch, channels, height, width = x.shape
    if weight.dim() != 4 or weight.shape[1] != channels:
        unfit(op, "weight", f"[N, {channels}, R, S]", weight.shape)
    n, _, rows, columns = weight.shape
    if padding is not None and (len(padding) not in (1, 4) or min(padding) < 0):
        unfit(op, "padding", "None, one number or four, 0 and above", list(padding))
    if stride < 1:
        unfit(op, "stride", "1 and above", stride)
    if activation not in ("none", "silu"):
        unfit(op, "activation", "none or silu", repr(activation))
    shaped(op, "bias", bias, n)
    left, right, top, bottom = _sides(padding, weight)
    scale = 2 if upsample else 1
    down, across = height * scale + top + bottom - rows, width * scale + left + right - columns
    if down < 0 or across < 0:
        unfit(op, "x", f"at least as large as the kernel {[rows, columns]}", x.shape)
    shaped(op, "add", add, batch, n)
    shape = [batch, n, down // stride + 1, across // stride + 1]
    shaped(op, "residual", residual, *shape)
    return shape


@conv2d.checks
def _check(*args: Any) -> list[int]:
    return check_conv2d("conv2d", *args)


@conv2d.backend("cpu", devices=("cpu",), supports=supports, strided=True)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool,
) -> Tensor:  # fmt: skip
    shape = _check(x, weight, bias, stride, padding, add, residual, activation, upsample)
    if not x.numel() or not weight.numel():
        return compose(x, weight, bias, stride, padding, add, residual, activation, upsample)
    sides = _sides(padding, weight)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    if taps.pay(weight, stride, upsample, x.dtype):
        images = x.contiguous(memory_format=torch.channels_last)
        y = taps.convolve(images, weight, bias, sides, add, residual, activation == "silu")
    elif tile := winograd.tile(weight, stride, sides, upsample, (shape[2], shape[3]), x.dtype):
        images = x.contiguous(memory_format=torch.channels_last)
        y = winograd.convolve(images, weight, bias, sides, add, residual, activation == "silu", upsample, tile)
    elif implicit_gemm.pays(weight, sides, upsample, (shape[2], shape[3]), x.dtype):
        images = x.contiguous(memory_format=torch.channels_last)
        y = implicit_gemm.convolve(images, weight, bias, stride, sides, add, residual, activation == "silu")
    else:
        y = direct.convolve(x, weight, bias, stride, sides, add, residual, activation, upsample)
    return y.contiguous(memory_format=memory_format(x))


# cuDNN's convolution without a bias, which PyTorch would add in a pass of its own, and one pass for all that follows.
@conv2d.backend("triton", devices=("cuda",), supports=supports, strided=True)
def by_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool, moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """moments: for those of the result, see `conv2d_moments`."""
    from diffkern.kernels.conv2d import conv2d as kernel

    if not x.numel() or not weight.numel():
        return compose(x, weight, bias, stride, padding, add, residual, activation, upsample)
    layout = memory_format(x)
    bias, add = (None if t is None else t.contiguous() for t in (bias, add))
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    y = kernel(x, weight, bias, stride, _sides(padding, weight), add, residual, activation, upsample, moments)
    return y.contiguous(memory_format=layout)


@conv2d.gradient
@conv2d.backend("torch", devices=("cpu", "cuda"), supports=_one_dtype, strided=True)
def compose(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool,
) -> Tensor:  # fmt: skip
    """PyTorch's kernels in the tensors' own dtype: the reference's float32 copies would cost more than they give."""
    y = _convolve(x, weight, bias, stride, padding, add, residual, activation, upsample)
    return y.contiguous(memory_format=memory_format(x))


@conv2d.batch_invariant
def _(
    run: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None,
    add: Tensor | None, residual: Tensor | None, activation: str, upsample: bool,
) -> Tensor:  # fmt: skip
    if run.name == "cpu":
        _, _, *shape = _check(x, weight, bias, stride, padding, add, residual, activation, upsample)
        sides, size = _sides(padding, weight), (shape[0], shape[1])
        if (
            taps.pay(weight, stride, upsample, x.dtype)
            or winograd.tile(weight, stride, sides, upsample, size, x.dtype)
            or implicit_gemm.pays(weight, sides, upsample, size, x.dtype)
        ):
            return run(x, weight, bias, stride, padding, add, residual, activation, upsample)  # our own kernel
    return apart(lambda x, a, r: run(x, weight, bias, stride, padding, a, r, activation, upsample), x, add, residual)


@conv2d.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, ...], n: int, kernel: int = 3, stride: int = 1,
        padding: Sequence[int] | None = None, extras: str = "bias", activation: str = "none", upsample: bool = False,
        layout: str = "channels_last", far: float = 0.0, workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            weight = make((n, shape[1], kernel, kernel), device, dtype, "channels_last", seed=1)
            weight /= (shape[1] * kernel * kernel) ** 0.5
            bias = make((n,), device, dtype, seed=2) if "bias" in extras else None
            add = make((shape[0], n), device, dtype, seed=3) if "add" in extras else None
            left, right, top, bottom = _sides(padding, weight)
            height, width = (s * 2 if upsample else s for s in shape[2:])
            size = ((height + top + bottom - kernel) // stride + 1, (width + left + right - kernel) // stride + 1)
            residual = make((shape[0], n, *size), device, dtype, layout, seed=4) if "residual" in extras else None
            x = make(shape, device, dtype, layout)
            x = x + far if far else x
            return x, weight, bias, stride, padding, add, residual, activation, upsample

        return Sample(name, args, workload)

    everything = "bias add residual"
    for layout in ("channels_last", "contiguous", "strided"):
        yield sample(f"a ResNet block, {layout}", (2, 8, 6, 6), 16, layout=layout)
        yield sample(f"odd, {layout}", (3, 5, 7, 9), 7, extras=everything, activation="silu", layout=layout)
        yield sample(f"upsample, {layout}", (2, 6, 4, 3), 5, upsample=True, layout=layout)
    yield sample("residual", (3, 8, 5, 5), 8, extras="bias residual")
    yield sample("add", (3, 8, 5, 5), 8, extras="add")
    yield sample("silu", (2, 8, 5, 5), 8, activation="silu")
    yield sample("one by one", (2, 12, 5, 7), 6, 1, extras=everything)
    yield sample("stride", (2, 6, 8, 8), 6, stride=2)
    yield sample("stride, padding at the end", (2, 6, 8, 10), 6, stride=2, padding=[0, 1, 0, 1])
    yield sample("upsample, everything", (2, 6, 5, 4), 7, extras=everything, activation="silu", upsample=True)
    yield sample("upsample, one by one", (2, 6, 3, 4), 4, 1, upsample=True)
    yield sample("one channel", (2, 1, 6, 6), 3)
    yield sample("one pixel", (2, 7, 1, 1), 4, extras=everything)
    for layout in ("channels_last", "contiguous", "strided"):
        yield sample(f"Winograd, {layout}", (2, 70, 9, 6), 37, extras=everything, activation="silu", layout=layout)
    yield sample("Winograd, small pictures", (7, 32, 4, 4), 40, extras="bias residual")
    yield sample("Winograd, few results", (2, 33, 5, 7), 5)
    yield sample("Winograd, one side padded", (2, 32, 5, 6), 18, padding=[0, 1, 2, 0], extras="add")
    yield sample("Winograd, many blocks and panels", (3, 66, 16, 13), 161)
    # A last panel of one vector: with one number in it, all but full, full; channels one beyond vectors or a block.
    yield sample("Winograd, 4 x 4, half a panel", (2, 33, 8, 9), 33, extras=everything, activation="silu")
    yield sample("Winograd, 4 x 4, half a panel, all but full", (2, 49, 8, 8), 47)
    yield sample("Winograd, 4 x 4, half a panel, upsample", (2, 65, 6, 5), 48, extras=everything, upsample=True)
    yield sample("Winograd, 4 x 4, 16 channels and few pixels", (3, 16, 2, 3), 17, extras="bias add")
    yield sample("Winograd, far from zero", (2, 64, 6, 6), 24, far=100.0)
    # In 16 bits these are computed in tiles of 4 x 4; pictures that tiles do not divide, a last panel that is not full.
    yield sample("Winograd, 4 x 4", (2, 70, 9, 11), 37, extras=everything, activation="silu")
    yield sample("Winograd, 4 x 4, upsample", (2, 34, 5, 7), 35, extras=everything, activation="silu", upsample=True)
    yield sample("Winograd, 4 x 4, one side padded", (2, 32, 9, 10), 18, padding=[0, 1, 2, 0], extras="add")
    yield sample("Winograd, 4 x 4, many blocks and panels", (3, 66, 16, 32), 161)
    # And in tiles of 6 x 6.
    yield sample("Winograd, 6 x 6", (2, 70, 17, 23), 37, extras=everything, activation="silu")
    yield sample("Winograd, 6 x 6, upsample", (2, 34, 9, 11), 35, extras=everything, activation="silu", upsample=True)
    yield sample("Winograd, 6 x 6, one side padded", (2, 32, 17, 18), 18, padding=[0, 1, 2, 0], extras="add")
    yield sample("Winograd, 6 x 6, many blocks and panels", (4, 66, 24, 28), 81)
    yield sample("Winograd, upsample", (2, 34, 4, 5), 35, extras=everything, activation="silu", upsample=True)
    # Nine taps of up to four results side by side: channels beyond a pair and beyond a block, pixels that registers do
    # not divide, and padding that no line of the picture is behind.
    for n, layout in ((1, "channels_last"), (2, "contiguous"), (3, "strided"), (4, "channels_last")):
        name, shape = f"few results, {n}, {layout}", (3, 29 + n, 6, 13 + n)
        yield sample(name, shape, n, extras=everything, activation="silu", layout=layout)
    yield sample("few results, many channels", (2, 131, 5, 4), 3)
    yield sample("few results, padding of some sides", (2, 6, 4, 5), 4, padding=[0, 4, 3, 1], extras="bias add")
    yield sample("few results, no padding", (2, 7, 3, 4), 2, padding=[0], extras="residual")
    yield sample("no sample", (0, 3, 5, 5), 4, extras=everything)
    yield sample("CIFAR UNet 16x16", (8, 256, 16, 16), 256, extras="bias residual", workload=True)
    yield sample("CIFAR UNet down 32x32", (8, 128, 32, 32), 128, stride=2, padding=[0, 1, 0, 1], workload=True)
    yield sample("CIFAR UNet up 8x8", (8, 256, 8, 8), 256, upsample=True, workload=True)
    yield sample("CIFAR UNet shortcut 8x8", (8, 512, 8, 8), 256, 1, workload=True)
    yield sample("SD 1.5 VAE up 64x64", (1, 512, 64, 64), 512, upsample=True, workload=True)
    yield sample("CIFAR UNet out 32x32", (8, 128, 32, 32), 3, workload=True)
    yield sample("emoji UNet 16x16", (36, 64, 16, 16), 64, extras="bias residual", workload=True)
    for name, shape, n, extras in (
        ("SD 1.5 UNet 64x64", (2, 320, 64, 64), 320, "bias add"),
        ("SD 1.5 UNet 32x32", (2, 640, 32, 32), 640, "bias residual"),
        ("SD 1.5 UNet 16x16", (2, 1280, 16, 16), 1280, "bias residual"),
        ("SD 1.5 UNet 8x8", (2, 1280, 8, 8), 1280, "bias residual"),
        ("SD 1.5 UNet 64x64, skip", (2, 960, 64, 64), 320, "bias add"),
        ("SD 1.5 UNet 16x16, skip", (2, 2560, 16, 16), 1280, "bias add"),
        ("SDXL UNet 128x128", (2, 320, 128, 128), 320, "bias residual"),
        ("SDXL UNet 64x64", (2, 640, 64, 64), 640, "bias residual"),
        ("SDXL UNet 32x32", (2, 1280, 32, 32), 1280, "bias residual"),
        ("CIFAR UNet 32x32, 1 picture", (1, 128, 32, 32), 128, "bias residual"),
        ("CIFAR UNet 32x32, 64 pictures", (64, 128, 32, 32), 128, "bias residual"),
        ("SD 1.5 VAE 64x64", (1, 512, 64, 64), 512, "bias residual"),
        ("SD 1.5 VAE 256x256", (1, 512, 256, 256), 512, "bias residual"),
        ("SD 1.5 VAE 512x512", (1, 256, 512, 512), 256, "bias residual"),
        ("SDXL VAE 1024x1024", (1, 128, 1024, 1024), 128, "bias residual"),
    ):
        yield for_gpu(sample(name, shape, n, extras=extras))
    yield for_gpu(sample("SD 1.5 UNet up 32x32", (2, 640, 32, 32), 640, upsample=True))


@conv2d.cost
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool,
) -> Cost:  # fmt: skip
    shape = _check(x, weight, bias, stride, padding, add, residual, activation, upsample)
    pixels = shape[0] * shape[2] * shape[3]
    numbers = x.numel() + weight.numel() + pixels * shape[1] * (1 if residual is None else 2)
    flops = 2 * pixels * weight.numel()
    return Cost(bytes=numbers * x.element_size(), flops=flops * 4 // 9 if upsample and weight.shape[2] == 3 else flops)

"""A convolution that also gives the moments of what it makes, so that the GroupNorm behind it reads that once: on a GPU
the pass that adds the bias and the residual has every number in its registers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.invariant import apart
from diffkern.layout import accumulate, memory_format
from diffkern.op import Backend, Cost, Sample, for_gpu, op
from diffkern.ops.conv2d import by_triton, check_conv2d, conv2d, supports

_PIXELS = 64  # of a chunk at least: its moments are then a sixteenth of its 16-bit numbers
_CHUNKS = 1024  # at most


def chunks_of(pixels: int) -> int:
    """How many runs of ceil(pixels / chunks) pixels a picture is cut into, none of them empty. By its size alone: the
    order of a sum must not depend on the batch."""
    chunks = max(1, min(_CHUNKS, pixels // _PIXELS))
    return -(-pixels // -(-pixels // chunks))


def moments_of(x: Tensor, chunks: int) -> Tensor:
    """x: [B, C, ...]. Returns [B, chunks, 2 C], float32 (float64 for float64): of each run of ceil(pixels / chunks)
    pixels the means of the channels, then the sums of their squared deviations."""
    rows = x.to(accumulate(x.dtype)).flatten(2)
    made = []
    for run in rows.split(-(-rows.shape[2] // chunks), dim=2):
        mean = run.mean(dim=2)
        made.append(torch.cat([mean, (run - mean[:, :, None]).square().sum(dim=2)], dim=1))
    return torch.stack(made, dim=1)


@op
def conv2d_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Sequence[int] | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    upsample: bool = False,
) -> tuple[Tensor, Tensor]:
    """The arguments of `conv2d`. Returns (y, moments): y is what conv2d returns, moments, [B, chunks, 2 N], float32,
    those of y as it is rounded, which group_norm_silu takes: of each run of pixels the means of the channels, then the
    sums of their squared deviations. chunks is decided by the size of a picture."""
    y = conv2d.reference(x, weight, bias, stride, padding, add, residual, activation, upsample)
    return y, moments_of(y, chunks_of(y.shape[2] * y.shape[3]))


@conv2d_moments.checks
def _check(*args: Any) -> list[int]:
    return check_conv2d("conv2d_moments", *args)


def _supports(x: Tensor, *rest: Any) -> bool | str:
    if memory_format(x) is not torch.channels_last:
        return "takes channels_last"
    return supports(x, *rest)


@conv2d_moments.backend("triton", devices=("cuda",), supports=_supports, strided=True)
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, n, height, width = _check(x, weight, *rest)
    moments = torch.empty(batch, chunks_of(height * width), 2 * n, device=x.device)
    return by_triton(x, weight, *rest, moments=moments), moments


@conv2d_moments.batch_invariant
def _(
    run: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int] | None,
    add: Tensor | None, residual: Tensor | None, activation: str, upsample: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return apart(lambda x, a, r: run(x, weight, bias, stride, padding, a, r, activation, upsample), x, add, residual)


@conv2d_moments.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, ...], n: int, kernel: int = 3, stride: int = 1,
        padding: Sequence[int] | None = None, extras: str = "", activation: str = "none", far: float = 0.0,
        workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            x = make(shape, device, dtype, "channels_last")
            weight = make((n, shape[1], kernel, kernel), device, dtype, "channels_last", seed=1)
            weight /= (shape[1] * kernel * kernel) ** 0.5
            bias = make((n,), device, dtype, seed=2) + far
            add = make((shape[0], n), device, dtype, seed=3) if "add" in extras else None
            call = x, weight, bias, stride, padding, add, None, activation, False
            size = _check(*call)
            residual = make(tuple(size), device, dtype, "channels_last", seed=4) if "residual" in extras else None
            return x, weight, bias, stride, padding, add, residual, activation, False

        return Sample(name, args, workload)

    # Many channels: the largest of a few sums of rounding errors can be small by chance, in the reference too.
    yield sample("a ResNet block", (2, 8, 6, 6), 64, extras="residual")
    yield sample("odd", (3, 5, 17, 19), 37, extras="add residual", activation="silu")
    # Chunks of several tiles, the last of them short; channels of two programs, the second narrow.
    yield sample("several chunks", (2, 3, 15, 17), 70, extras="residual")
    yield sample("far from zero", (2, 4, 20, 20), 48, extras="residual", far=100.0)
    yield sample("one by one", (2, 12, 9, 15), 72, 1)
    # A tile of our own convolution's is two chunks; the channels fill no last tile.
    yield sample("even chunks", (3, 8, 8, 16), 208, extras="add residual", activation="silu")
    yield sample("stride, padding at the end", (2, 6, 24, 26), 52, stride=2, padding=[0, 1, 0, 1])
    # No doubled picture: on a GPU all its pixels share the rounding errors of its weights, which do not average out as
    # the reference's do. tests/test_conv2d_moments.py compares what is given with what was written.
    yield sample("CIFAR UNet 16x16", (8, 256, 16, 16), 256, extras="residual", workload=True)
    for name, shape, n in (
        ("CIFAR UNet 32x32, 1 picture", (1, 128, 32, 32), 128),
        ("CIFAR UNet 32x32, 64 pictures", (64, 128, 32, 32), 128),
        ("SD 1.5 UNet 64x64", (2, 320, 64, 64), 320),
        ("SD 1.5 UNet 32x32", (2, 640, 32, 32), 640),
        ("SD 1.5 UNet 16x16", (2, 1280, 16, 16), 1280),
        ("SDXL UNet 128x128", (2, 320, 128, 128), 320),
        ("SDXL UNet 64x64", (2, 640, 64, 64), 640),
        ("SDXL UNet 32x32", (2, 1280, 32, 32), 1280),
        ("SD 1.5 VAE 64x64", (1, 512, 64, 64), 512),
        ("SD 1.5 VAE 128x128", (1, 512, 128, 128), 512),
        ("SD 1.5 VAE 256x256", (1, 256, 256, 256), 256),
        ("SD 1.5 VAE 512x512", (1, 128, 512, 512), 128),
        ("SDXL VAE 1024x1024", (1, 128, 1024, 1024), 128),
    ):
        yield for_gpu(sample(name, shape, n, extras="residual"))


@conv2d_moments.cost
def _(*args: Any) -> Cost:
    return conv2d.count_cost(*args)

"""RMSNorm (Zhang & Sennrich 2019): LayerNorm without the mean."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import shaped, unfit
from diffkern.layout import accumulate, fast_dtype, memory_format
from diffkern.op import Cost, Sample, for_gpu, op
from diffkern.ops.layer_norm_modulate import SHAPES, WORKLOADS, why_not_on_gpu


@op
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x: [..., C]. weight: [C] or None. Returns the shape, dtype and layout of x."""
    acc = accumulate(x.dtype)
    y = F.rms_norm(x.to(acc), x.shape[-1:], None if weight is None else weight.to(acc), eps)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


@rms_norm.checks
def _(x: Tensor, weight: Tensor | None, eps: float) -> None:
    if not x.dim():
        unfit("rms_norm", "x", "contiguous [..., C]", x.shape)
    shaped("rms_norm", "weight", weight, x.shape[-1])


def _supports(x: Tensor, weight: Tensor | None, eps: float) -> bool | str:
    if memory_format(x) is torch.channels_last:
        return "takes no channels_last x: its rows do not lie together"
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return "takes a weight in float32 or the dtype of x"
    return fast_dtype(x.dtype)


def _supports_triton(x: Tensor, weight: Tensor | None, eps: float) -> bool | str:
    fits = why_not_on_gpu(x)
    return _supports(x, weight, eps) if fits is True else fits


# A CUDA kernel was tried and deleted. On an H200, in graphs, in bfloat16, Triton takes 2.8 us for 8 x 256 x 384 numbers
# and 16.4 for 4608 x 3072; it took 2.9 and 23.4.
@rms_norm.backend("triton", devices=("cuda",), supports=_supports_triton)
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    from diffkern.kernels.rms_norm import rms_norm as kernel

    return kernel(x, weight, eps)


@rms_norm.backend("cpu", devices=("cpu",), supports=_supports)
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.ops.diffkern_C.rms_norm(x, weight, eps)


@rms_norm.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, ...], affine: bool = True, layout: str = "contiguous", workload: bool = False
    ) -> Sample:
        def args() -> tuple[object, ...]:
            return make(shape, device, dtype, layout), make(shape[-1:], device, dtype, seed=1) if affine else None, 1e-6

        return Sample(name, args, workload)

    for name, shape in SHAPES:
        yield sample(name, shape)
    yield sample("bare", (2, 5, 24), affine=False)
    yield sample("strided", (2, 5, 24), layout="strided")
    yield sample("a matrix", (3, 40))
    for name, shape in WORKLOADS:
        yield sample(name, shape, workload=True)
    yield sample("heads", (2, 3, 4, 64))
    yield for_gpu(sample("FLUX.1 1024x1024, 4 pictures", (4, 4608, 3072)))


@rms_norm.cost
def _(x: Tensor, weight: Tensor | None, eps: float) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size(), flops=4 * x.numel())

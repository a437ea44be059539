"""3 x 3 convolutions on the CPU by Winograd's F(2 x 2, 3 x 3) (Lavin & Gray 2016): in float32, whatever the dtype of
the tensors, with 16 multiplications for the 36 of the definition, or with 9 for a picture that is doubled first.

Its error is about that of oneDNN's own convolution. But an infinity in x, like one that a sum overflows to, comes out
as NaN in some of the pixels that see it: differences of infinities are taken on the way.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from diffkern.layout import is_dense
from diffkern.packing import packed


@functools.cache
def _measured() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def pays(weight: Tensor, stride: int, sides: tuple[int, ...], upsample: bool, size: tuple[int, int]) -> bool:
    """Whether this is a convolution that Winograd's way computes, and faster than oneDNN. size: H' and W'. The batch
    has no say: a sample alone must come out as it does in a batch."""
    n, channels, *kernel = weight.shape
    if kernel != [3, 3] or stride != 1 or (upsample and sides != (1, 1, 1, 1)):
        return False
    # Below 32 channels the transforms take longer than the products that they save. Below 4 x 4 pixels most of what is
    # computed lies outside the picture, and reading the weights takes the time: they are 16/9 as large.
    # For few results of many channels too, the transforms are most of the work.
    return _measured() and channels >= 32 and min(size) >= 4 and (n > 16 or channels <= 128)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, sides: tuple[int, ...], add: Tensor | None,
    residual: Tensor | None, silu: bool, upsample: bool,
) -> Tensor:  # fmt: skip
    """The arguments of diffkern.conv2d, x and residual channels_last. Returns [B, N, H', W'], channels_last."""
    copy = packed(
        weight,
        ("winograd", upsample),
        lambda: torch.ops.diffkern_C.winograd_weight(weight if is_dense(weight) else weight.contiguous(), upsample),
    )
    bias, add = (None if t is None else t.contiguous() for t in (bias, add))
    return torch.ops.diffkern_C.winograd(x, copy, len(weight), sides, bias, add, silu, residual, upsample)

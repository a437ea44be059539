"""Convolutions on the CPU as one matrix product, whose rows are the pixels of the result (implicit GEMM): of any kernel
and stride, by the definition.

Pixels that see the same taps are multiplied together, so that what lies outside a picture costs nothing, nor does
padding of one side. In bfloat16 with AVX512_BF16 pairs of channels are multiplied as they are. What a pixel's sum is
taken over, and in which order, depends on its place in the picture alone: a sample has the bits that it has in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern import invariant
from diffkern.packing import compute_dtype, packed, vectors


def pays(weight: Tensor, sides: Sequence[int], upsample: bool, size: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether this convolution is computed so: where it is no slower than oneDNN's, and under `batch_invariant()`
    wherever it can be. size: H' and W'. The batch has no say. It has not been timed against AMX."""
    n, channels, *kernel = weight.shape
    if upsample or max(sides[:2]) >= kernel[1] or max(sides[2:]) >= kernel[0] or vectors() is None:
        return False
    native = compute_dtype(dtype, convolution=True) == dtype
    if native and dtype != torch.float32 and torch.cpu._is_amx_tile_supported():
        return False
    if not native or invariant.is_on():  # oneDNN would be given converted pictures, or one sample at a time
        return True
    # Of few channels the taps are gathered a few numbers at a time. Many pixels and many weights leave the caches, and
    # there oneDNN has the last percent.
    if channels < 16:
        return False
    # With AVX2 alone oneDNN lays a weight out for the size of a batch, and in a batch of another size does so anew in
    # every call: 30 ns a number, up to six times as long as what it then multiplies.
    if vectors() == "AVX2":
        return True
    pixels = size[0] * size[1]
    if pixels > 256:
        return False
    if kernel == [1, 1]:  # of few channels, little more than read and written
        return dtype != torch.float32 and channels >= 96 and channels * pixels <= 1 << 17
    return n * channels <= 1 << 18


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sides: Sequence[int], add: Tensor | None,
    residual: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """The arguments of diffkern.conv2d, x and residual channels_last. Returns [B, N, H', W'], channels_last."""
    copy = packed(
        [weight],
        "implicit GEMM",
        lambda: torch.ops.diffkern_C.panels(weight.permute(0, 2, 3, 1).flatten(2).contiguous(), False),
    )
    bias = None if bias is None else bias.contiguous()
    add = None if add is None else add.contiguous()
    n, _, *kernel = weight.shape
    convolution = torch.ops.diffkern_C.convolution.default
    return convolution(x, copy, n, kernel, stride, sides, bias, add, silu, residual)

"""3 x 3 convolutions on the CPU that make up to four results, as of the picture at the end of a UNet or a VAE.

A product that has results in the lanes of its vectors leaves most of them empty, in each of the nine taps. Here the
taps of all results lie in the lanes beside each other, 27 numbers for three results: each pixel is multiplied once, and
a result adds what nine pixels have for it. In bfloat16 with AVX512_BF16 pairs are multiplied as they are.

It is the definition, with nothing kept between calls: no transform that rounds, and what is not finite reaches the
pixels that see it and no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.packing import compute_dtype, vectors

MOST = 4
"""Results that the kernel makes."""


def pay(weight: Tensor, stride: int, upsample: bool, dtype: torch.dtype) -> bool:
    """Whether this convolution is computed so, faster than by Winograd's way or by oneDNN: whatever the size of the
    picture, and of the batch. It has not been timed against AMX."""
    n, _, *kernel = weight.shape
    if n > MOST or kernel != [3, 3] or stride != 1 or upsample or vectors() is None:
        return False
    native = dtype != torch.float32 and compute_dtype(dtype, convolution=True) == dtype
    return not (native and torch.cpu._is_amx_tile_supported())


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, sides: tuple[int, ...], add: Tensor | None,
    residual: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """The arguments of diffkern.conv2d, x and residual channels_last. Returns [B, N, H', W'], channels_last."""
    bias, add = (None if t is None else t.contiguous() for t in (bias, add))
    return torch.ops.diffkern_C.taps(x, weight, sides, bias, add, silu, residual)

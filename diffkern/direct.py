"""Convolutions on the CPU by their definition: oneDNN's, with the weight packed once, and with what follows in its
accumulators or in one pass behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.layout import accumulate
from diffkern.ops.linear import ACTIVATIONS
from diffkern.packing import compute_dtype, packed


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sides: tuple[int, int, int, int], add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool,
) -> Tensor:  # fmt: skip
    """The arguments of diffkern.conv2d, with the padding of all sides and residual channels_last. Returns
    [B, N, H', W'], channels_last."""
    dtype, given = compute_dtype(x.dtype, convolution=True), x.dtype
    left, right, top, bottom = sides
    quarters = upsample and stride == 1 and sides == (1, 1, 1, 1) and tuple(weight.shape[2:]) == (3, 3)
    if upsample and not quarters:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if left != right or top != bottom:  # oneDNN could, PyTorch does not ask it to
        x, left, top = F.pad(x, sides), 0, 0
    if dtype != given:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were
    if quarters:
        y = _upsampled(x, weight, bias, dtype)
    else:
        place = ([top, left], [stride, stride], [1, 1], 1)
        copy = packed(
            [weight],
            ("conv2d", dtype, stride, top, left, x.shape[2:]),
            lambda: _pack(weight.detach(), dtype, x.shape, *place),
        )
        product = torch.ops.mkldnn._convolution_pointwise
        if dtype == given and add is None and residual is None:
            return product.default(x, copy, bias, *place, "swish" if activation == "silu" else "none", [], "")
        if dtype == given and add is None and activation == "none":
            return product.binary(x, residual, copy, bias, *place, "add", 1.0, None, [], None)
        y = product.default(x, copy, bias, *place, "none", [], "").permute(0, 2, 3, 1).contiguous()
    out = y
    if dtype != given or activation != "none" or add is not None or residual is not None:
        out = y if dtype == given else torch.empty(y.shape, dtype=given)
        residual = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
        add = None if add is None else add.contiguous()
        torch.ops.diffkern_C.epilogue(out, y, add, list(ACTIVATIONS).index(activation), None, residual)
    return out.permute(0, 3, 1, 2)


def _pack(weight: Tensor, dtype: torch.dtype, size: torch.Size, *place: object) -> Tensor:
    # For one picture of the right size: in the layout for another a convolution can take 9 times as long, below 8 x 8
    # pixels; the size of the batch matters to nothing.
    one = [1, *size[1:]]
    return torch.ops.mkldnn._reorder_convolution_weight(weight.to(dtype).contiguous(), *place, one)


def _upsampled(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The 3 x 3 convolution of a doubled picture: [B, 2 H, 2 W, N]. A pixel of the result sees two rows and two columns
    of the small picture, so that sums of the weight's rows and columns, four kernels of 2 x 2 for the four positions in
    a doubled pixel, take 4/9 of the work; all are one convolution, of (H + 1) (W + 1) pixels."""
    batch, _, height, width = x.shape
    n, place = len(weight), ([1, 1], [1, 1], [1, 1], 1)
    copy = packed(
        [weight],
        ("conv2d upsampled", dtype, x.shape[2:]),
        lambda: _pack(_quarters_of(weight.detach()), dtype, x.shape, *place),
    )
    bias = None if bias is None else bias.repeat(4)
    four = torch.ops.mkldnn._convolution_pointwise(x, copy, bias, *place, "none", [], "")
    four = four.permute(0, 2, 3, 1)
    y = torch.empty(batch, height, 2, width, 2, n, dtype=dtype)
    for i, (a, b) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        y[:, :, a, :, b] = four[:, a : a + height, b : b + width, i * n : (i + 1) * n]
    return y.view(batch, 2 * height, 2 * width, n)


def _quarters_of(weight: Tensor) -> Tensor:
    """[N, C, 3, 3] -> [4 N, C, 2, 2], the kernels of the upper left, upper right, lower left and lower right pixel."""

    def pairs(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        first, middle, last = w.unbind(axis)
        return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)

    return torch.cat([quarter for half in pairs(weight.to(accumulate(weight.dtype)), 2) for quarter in pairs(half, 3)])

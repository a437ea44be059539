"""Convolution as a product of matrices that nobody builds, and what follows it: bias, time embedding, SiLU, residual.

A row of the product is a pixel of the result, of any sample, and its sum runs over the kernel's taps and the channels
below each: a tap reads the pixels of a tile shifted, zero outside the picture, and from an upsampled picture every
pixel twice in each direction. The tile depends on the layer alone, so that a sample's result does not depend on its
batch.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import on_device
from .linear import cut_of, silu, vector


@triton.jit(do_not_specialize=["batch", "height", "width", "top", "left"])
def _conv2d(
    x_ptr, weight_ptr, bias, add, residual, y_ptr, batch, height, width, top, left,
    x_sample, x_channel, x_row, x_pixel, y_sample, y_channel, y_pixel, y_width, pixels, n, channels,
    TAPS: tl.constexpr, TAPS_X: tl.constexpr, STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """height and width of what is convolved, upsampled or not; weight: [N, taps, C]; pixels of a sample's result."""
    blocks = tl.cdiv(n, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    pixel = (first % pixels).to(tl.int32) + tl.arange(0, ROWS)  # behind the last of a sample: of the next
    sample = first // pixels + pixel // pixels
    pixel = pixel % pixels
    in_rows = sample < batch
    h = pixel // y_width * STRIDE - top
    w = pixel % y_width * STRIDE - left
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = (column < n)[None, :]
    depth = tl.arange(0, DEPTH)

    x_ptr += depth.to(tl.int64)[None, :] * x_channel
    x_pixels = sample * x_sample
    w_at = weight_ptr + column.to(tl.int64)[None, :] * (TAPS * channels) + depth[:, None]
    steps = tl.cdiv(channels, DEPTH)
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(0, TAPS * steps):
        tap = i // steps
        start = i % steps * DEPTH
        at_h = h + tap // TAPS_X
        at_w = w + tap % TAPS_X
        in_picture = in_rows & (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
        if UPSAMPLE:
            at_h = at_h // 2
            at_w = at_w // 2
        there = depth < channels - start
        x_at = x_pixels + at_h.to(tl.int64) * x_row + at_w.to(tl.int64) * x_pixel
        x_at = x_ptr + tl.cast(start, tl.int64) * x_channel + x_at[:, None]
        x = tl.load(x_at, in_picture[:, None] & there[None, :], other=0.0)
        weight = tl.load(w_at + (tap * channels + start), in_columns & there[:, None], other=0.0)
        y = tl.dot(x, weight, y, input_precision="ieee")

    if bias is not None:
        y += vector(bias, column, n)
    inside = in_rows[:, None] & in_columns
    if add is not None:
        y += tl.load(add + sample[:, None] * n + column[None, :], inside, other=0.0).to(tl.float32)
    if SILU:
        y = silu(y)
    at = sample * y_sample + pixel.to(tl.int64) * y_pixel
    at = at[:, None] + column.to(tl.int64)[None, :] * y_channel
    if residual is not None:
        y += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, corner: tuple[int, int], add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    """activation(conv2d(x) + bias + add) + residual into `out`, contiguous or channels_last, and residual as out is.
    x: any strides; weight: channels_last; corner: the zeros above and on the left of x."""
    if out.numel():
        batch, n, y_height, y_width = out.shape
        channels, taps_y, taps_x = weight.shape[1:]
        height, width = (side * 2 if upsample else side for side in x.shape[2:])
        pixels = y_height * y_width
        y_strides = (n * pixels, pixels, 1) if out.is_contiguous() else (n * pixels, 1, n)
        cut = cut_of(n, channels, x.element_size(), large=False)  # addresses of pixels take what sums would
        with on_device(x):
            _conv2d[(triton.cdiv(batch * pixels, cut.ROWS) * triton.cdiv(n, cut.COLUMNS),)](
                x, weight, bias, add, residual, out, batch, height, width, *corner, *x.stride(), *y_strides, y_width,
                pixels, n, channels, TAPS=taps_y * taps_x, TAPS_X=taps_x, STRIDE=stride, UPSAMPLE=upsample,
                SILU=activation == "silu", **cut._asdict(), enable_fp_fusion=True,
            )  # fmt: skip
    return out

"""What follows a product of matrices: bias, time embedding, activation, gate and residual. As parts of a kernel that
makes the product, and as a kernel of its own: one pass over what a library made, in place where the result is as large.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, grid, on_device, power_of_2, sample_index
from .launch import remembered

_TILE = 2048  # elements of a program: two accesses of 16 bytes a thread to each tensor


@triton.jit
def silu(y):
    return y * tl.sigmoid(y)


@triton.jit
def _gelu(y):
    return 0.5 * y * (1 + tl.math.erf(y * 0.7071067811865476))


@triton.jit
def activate(y, g, ACTIVATION: tl.constexpr):
    """g: the second half of the features where there is one."""
    if ACTIVATION == "silu":
        return silu(y)
    elif ACTIVATION == "gelu":
        return _gelu(y)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "geglu":
        return y * _gelu(g)
    elif ACTIVATION == "swiglu":
        return y * silu(g)
    else:
        return y


@triton.jit
def vector(ptr, column, n):
    """A row of n numbers, to be broadcast over rows."""
    return tl.load(ptr + column, column < n, other=0.0).to(tl.float32)[None, :]


@remembered
@triton.jit(do_not_specialize=["batch", "rows", "width"])
def _epilogue(
    x_ptr, bias, add, gate, residual, y_ptr, batch, rows, columns, width,
    ACTIVATION: tl.constexpr, PIXELS_FIRST: tl.constexpr, QUARTERS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A sample of the result is [rows, columns]: pixels and channels, or channels and pixels. QUARTERS: x holds the
    four pixels that a pixel of the small picture becomes side by side, [(H + 1) (W + 1), 4, columns]; width: 2 W.
    SPLITS: x is the first of so many that are to be summed."""
    TWO: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "swiglu"
    sample = sample_index()
    if sample >= batch:
        return
    blocks = tl.cdiv(columns, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows - first) & (column < columns)
    start = (sample * rows + first) * columns
    at = row * columns + column

    whole = tl.cast(batch, tl.int64) * rows * columns
    if QUARTERS:
        pixel = first.to(tl.int32) + row
        h = pixel // width
        w = pixel % width
        wide = width // 2 + 1
        small = sample * ((tl.cast(rows, tl.int32) // width // 2 + 1) * wide) + (h + 1) // 2 * wide + (w + 1) // 2
        x_at = x_ptr + (small * 4 + h % 2 * 2 + w % 2) * columns + column
    elif TWO:
        x_at = x_ptr + start * 2 + row * (2 * columns) + column
    else:
        x_at = x_ptr + start + at
    y = tl.load(x_at, inside, other=0.0).to(tl.float32)
    for i in tl.static_range(1, SPLITS):
        y += tl.load(x_at + i * whole, inside, other=0.0).to(tl.float32)
    g = y
    if TWO:
        g = tl.load(x_at + columns, inside, other=0.0).to(tl.float32)

    if PIXELS_FIRST:
        channel = column
        channels = columns
    else:
        channel = first.to(tl.int32) + row
        channels = rows
    known = channel < channels
    of_sample = sample * channels + channel
    if bias is not None:
        y += tl.load(bias + channel, known, other=0.0).to(tl.float32)
    if add is not None:
        y += tl.load(add + of_sample, known, other=0.0).to(tl.float32)
    y = activate(y, g, ACTIVATION)
    if gate is not None:
        y *= tl.load(gate + of_sample, known, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + start + at, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), inside)


def _columns_of(columns: int) -> int:
    """The columns of a tile: all of its rows full where a power of two divides them that is long enough a run."""
    divisor = columns & -columns
    return min(divisor, 256) if divisor >= 64 else min(256, power_of_2(columns))


def epilogue(
    x: Tensor, bias: Tensor | None, add: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None,
    y: Tensor, pixels_first: bool = True, quarters: bool = False, splits: int = 1,
) -> Tensor:  # fmt: skip
    """activation(x + bias + add) * gate + residual into y, which may be x. y, residual: [B, ..., N]; x also, 2 N for a
    gated activation; or all [B, N, ...] with pixels_first False. bias: [N], none before a gated activation; add, gate:
    [B, N]. quarters: x is [B, H + 1, W + 1, 4 N], y [B, 2 H, 2 W, N], see `conv2d`. splits: x is the first of so many,
    to be summed. All contiguous."""
    if not y.numel():
        return y
    batch, columns = y.shape[0], y.shape[-1] if pixels_first else y.shape[2:].numel()
    if pixels_first and add is None and gate is None and not quarters:
        batch = 1  # rows are rows: short samples share a program
    rows = y.numel() // (batch * columns)
    wide = _columns_of(columns)
    tall = max(1, _TILE // wide)
    chunks = cdiv(rows, tall) * cdiv(columns, wide)
    with on_device(x):
        _epilogue[grid(batch, chunks)](
            x, bias, add, gate, residual, y, batch, rows, columns, y.shape[2] if quarters else 0,
            ACTIVATION=activation, PIXELS_FIRST=pixels_first, QUARTERS=quarters, SPLITS=splits, ROWS=tall, COLUMNS=wide,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y

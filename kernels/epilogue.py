"""What follows a product of matrices: bias, time embedding, activation, gate and residual. As parts of a kernel that
makes the product, and as a kernel of its own: one pass over what a library made, in place where the result is as large.
Or as one that also gives the moments of what it writes, which a GroupNorm then need not read for them.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, grid, on_device, power_of_2, sample_index, shifted_moments
from .launch import remembered

_TILE = 2048  # elements of a program: two accesses of 16 bytes a thread to each tensor
_RUN = 64  # channels of a program that gives moments: narrow, since it goes down many pixels; of twice the warps, since
# its sums take registers


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


@triton.jit
def _tile(
    x_ptr, bias, add, gate, residual, batch, rows, columns, width, sample, first, row, column, inside,
    ACTIVATION: tl.constexpr, PIXELS_FIRST: tl.constexpr, QUARTERS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A tile of the result in float32, from row `first` on. A sample of the result is [rows, columns]: pixels and
    channels, or channels and pixels. QUARTERS: x holds the four pixels that a pixel of the small picture becomes side
    by side, [(H + 1) (W + 1), 4, columns]; width: 2 W. SPLITS: x is the first of so many that are to be summed."""
    TWO: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "swiglu"
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
    return y


@remembered
@triton.jit(do_not_specialize=["batch", "rows", "width"])
def _epilogue(
    x_ptr, bias, add, gate, residual, y_ptr, batch, rows, columns, width,
    ACTIVATION: tl.constexpr, PIXELS_FIRST: tl.constexpr, QUARTERS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = sample_index()
    if sample >= batch:
        return
    blocks = tl.cdiv(columns, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows - first) & (column < columns)
    y = _tile(x_ptr, bias, add, gate, residual, batch, rows, columns, width, sample, first, row, column, inside,
              ACTIVATION, PIXELS_FIRST, QUARTERS, SPLITS)  # fmt: skip
    at = (sample * rows + first) * columns + (row * columns + column)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _written(
    x_ptr, bias, add, residual, y_ptr, batch, rows, columns, width, sample, first, end, row, column,
    ACTIVATION: tl.constexpr, QUARTERS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Writes a tile of pixels and channels, up to the pixel `end`: (its numbers as they are read again, their mask)."""
    inside = (row < end - first) & (column < columns)
    y = _tile(x_ptr, bias, add, None, residual, batch, rows, columns, width, sample, first, row, column, inside,
              ACTIVATION, True, QUARTERS, SPLITS)  # fmt: skip
    rounded = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (sample * rows + first) * columns + (row * columns + column), rounded, inside)
    return tl.where(inside, rounded.to(tl.float32), 0.0), inside


@remembered
@triton.jit(do_not_specialize=["batch", "rows", "width", "chunks", "length"])
def _epilogue_moments(
    x_ptr, bias, add, residual, y_ptr, moments, batch, rows, columns, width, chunks, length,
    ACTIVATION: tl.constexpr, QUARTERS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_epilogue` of pixels and channels, a chunk of `length` pixels a program; moments: [batch, chunks, 2 columns]."""
    sample = sample_index()
    if sample >= batch:
        return
    blocks = tl.cdiv(columns, COLUMNS)
    chunk = tl.program_id(0) // blocks
    first = chunk.to(tl.int64) * length
    end = tl.minimum(first + length, rows)
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    y, inside = _written(x_ptr, bias, add, residual, y_ptr, batch, rows, columns, width, sample, first, end, row,
                         column, ACTIVATION, QUARTERS, SPLITS)  # fmt: skip
    shift = tl.sum(y, axis=0) / tl.minimum(end - first, ROWS).to(tl.float32)
    d = tl.where(inside, y - shift[None, :], 0.0)
    d2 = d * d
    for done in range(ROWS, length, ROWS):
        y, inside = _written(x_ptr, bias, add, residual, y_ptr, batch, rows, columns, width, sample, first + done, end,
                             row, column, ACTIVATION, QUARTERS, SPLITS)  # fmt: skip
        more = tl.where(inside, y - shift[None, :], 0.0)
        d += more
        d2 += more * more
    mean, squares = shifted_moments((end - first).to(tl.float32), shift, d, d2)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    at = moments + (sample * chunks + chunk) * 2 * columns + c
    tl.store(at, mean, c < columns)
    tl.store(at + columns, squares, c < columns)


def _columns_of(columns: int) -> int:
    """The columns of a tile: all of its rows full where a power of two divides them that is long enough a run."""
    divisor = columns & -columns
    return min(divisor, 256) if divisor >= 64 else min(256, power_of_2(columns))


def epilogue(
    x: Tensor, bias: Tensor | None, add: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None,
    y: Tensor, pixels_first: bool = True, quarters: bool = False, splits: int = 1, moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """activation(x + bias + add) * gate + residual into y, which may be x. y, residual: [B, ..., N]; x also, 2 N for a
    gated activation; or all [B, N, ...] with pixels_first False. bias: [N], none before a gated activation; add, gate:
    [B, N]. quarters: x is [B, H + 1, W + 1, 4 N], y [B, 2 H, 2 W, N], see `conv2d`. splits: x is the first of so many,
    to be summed. moments: None, or float32 [B, chunks, 2 N] for those of y as it is rounded, pixels first and without
    a gate: of each run of ceil(pixels / chunks) pixels the N means, then the N sums of squared deviations. All
    contiguous."""
    if not y.numel():
        return y
    batch, columns = y.shape[0], y.shape[-1] if pixels_first else y.shape[2:].numel()
    if pixels_first and add is None and gate is None and not quarters and moments is None:
        batch = 1  # rows are rows: short samples share a program
    rows = y.numel() // (batch * columns)
    width = y.shape[2] if quarters else 0
    wide = _columns_of(columns)
    with on_device(x):
        if moments is not None:
            wide = min(wide, _RUN)
            chunks = moments.shape[1]
            _epilogue_moments[grid(batch, chunks * cdiv(columns, wide))](
                x, bias, add, residual, y, moments, batch, rows, columns, width, chunks, cdiv(rows, chunks),
                ACTIVATION=activation, QUARTERS=quarters, SPLITS=splits, ROWS=_TILE // wide, COLUMNS=wide,
                num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
            return y
        tall = max(1, _TILE // wide)
        chunks = cdiv(rows, tall) * cdiv(columns, wide)
        _epilogue[grid(batch, chunks)](
            x, bias, add, gate, residual, y, batch, rows, columns, width,
            ACTIVATION=activation, PIXELS_FIRST=pixels_first, QUARTERS=quarters, SPLITS=splits, ROWS=tall, COLUMNS=wide,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y

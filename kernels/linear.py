"""The linear layer with what follows it in one kernel: activation, gate and residual see the sums before memory does.

A program makes one tile of the result. Its size depends on the layer alone and its sums run from the first feature to
the last, so that a row's result depends on no other row. GEGLU and SwiGLU keep two tiles of sums, of the value and of
what gates it: their weight's rows n and N + n.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device


class Cut(NamedTuple):
    """A program's tile of the result and its step along the sums; compile-time. All fit into 99 KB of shared memory,
    what a multiprocessor has at least."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int


def cut_of(n: int, k: int, size: int, accumulators: int = 1, large: bool = True) -> Cut:
    """For n columns, sums over k numbers of `size` bytes, and so many tiles of sums; large tiles only if `large`."""
    wide = k % 16 == 0  # what Triton knows of k; else numbers come one by one, and addresses fill registers
    if size == 4:  # no tensor cores in full precision: products in registers, which small tiles leave room for
        rows, most, depth, warps = 64, 64, 16, 8
    elif n >= 1024 and n % 16 == 0 and wide and large:
        rows, most, depth, warps = 128, 128, 64, 8
    else:  # enough programs for the chip also where the layer is narrow
        rows, most, depth, warps = 64, 64, 64 if wide else 32, 4 if wide else 8
    columns = max(16, min(most // accumulators, triton.next_power_of_2(n)))
    return Cut(rows, columns, max(16, min(depth, triton.next_power_of_2(k))), warps, 3)


@triton.jit
def silu(y):
    return y * tl.sigmoid(y)


@triton.jit
def _gelu(y):
    return 0.5 * y * (1 + tl.math.erf(y * 0.7071067811865476))


@triton.jit
def _activate(y, g, ACTIVATION: tl.constexpr):
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


@triton.jit(do_not_specialize=["rows", "tokens"])
def _linear(
    x_ptr, weight_ptr, bias, residual, gate, y_ptr, rows, tokens, n, k,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    TWO: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "swiglu"
    blocks = tl.cdiv(n, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    in_rows = (row < rows - first)[:, None]
    in_columns = (column < n)[None, :]

    x_at = x_ptr + first * k + row[:, None] * k + depth[None, :]
    w_at = weight_ptr + column.to(tl.int64)[None, :] * k + depth[:, None]
    half = tl.cast(n, tl.int64) * k  # from a value's row of the weight to its gate's
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, k, DEPTH):
        there = depth < k - start
        x = tl.load(x_at, in_rows & there[None, :], other=0.0)
        w_there = in_columns & there[:, None]
        y = tl.dot(x, tl.load(w_at, w_there, other=0.0), y, input_precision="ieee")
        if TWO:
            g = tl.dot(x, tl.load(w_at + half, w_there, other=0.0), g, input_precision="ieee")
        x_at += DEPTH
        w_at += DEPTH

    if bias is not None:
        y += vector(bias, column, n)
        if TWO:
            g += vector(bias + n, column, n)
    y = _activate(y, g, ACTIVATION)
    inside = in_rows & in_columns
    if gate is not None:
        sample = first // tokens + ((first % tokens).to(tl.int32) + row) // tokens
        y *= tl.load(gate + sample[:, None] * n + column[None, :], inside, other=0.0).to(tl.float32)
    at = first * n + row[:, None] * n + column[None, :]
    if residual is not None:
        y += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    """activation(x weight^T + bias) * gate + residual. All contiguous; x: [B, ..., K], gate: [B, N]."""
    accumulators = 2 if activation in ("geglu", "swiglu") else 1
    n, k = weight.shape[0] // accumulators, weight.shape[1]
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=x.dtype)
    if y.numel():
        rows = y.numel() // n
        cut = cut_of(n, k, x.element_size(), accumulators)
        with on_device(x):
            _linear[(triton.cdiv(rows, cut.ROWS) * triton.cdiv(n, cut.COLUMNS),)](
                x, weight, bias, residual, gate, y, rows, rows // x.shape[0], n, k, ACTIVATION=activation,
                **cut._asdict(), enable_fp_fusion=True,
            )  # fmt: skip
    return y

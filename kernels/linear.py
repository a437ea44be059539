"""The linear layer with what follows it: the library's product and one pass behind it; or, where a table says that it
is faster, one kernel, in which activation, gate and residual see the sums before memory does.

In the kernel a program makes one tile of the result. Its size depends on the layer alone and its sums run from the
first feature to the last, so that a row's result depends on no other row. GEGLU and SwiGLU keep two tiles of sums, of
the value and of what gates it: their weight's rows n and N + n.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .common import cdiv, on_device, power_of_2
from .epilogue import activate, epilogue, vector
from .launch import remembered

_GATED = ("geglu", "swiglu")
_GROUP = tl.constexpr(8)  # tiles of rows whose programs run side by side: what they read of the weight is in the cache


class Cut(NamedTuple):
    """A program's tile of the result and its step along the sums; compile-time. TMA: tiles are fetched by descriptor,
    by one thread: from sm_90 on, where rows are multiples of 16 bytes."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int
    TMA: int = 0


# What is worth trying, at most `accumulators` times as wide as it may be. The first fits into 99 KB of shared memory,
# what a multiprocessor has at least.
CUTS = (
    Cut(64, 64, 64, 4, 3),
    Cut(64, 128, 64, 4, 4, 1),
    Cut(128, 128, 64, 8, 4, 1),
    Cut(128, 256, 64, 8, 3, 1),
)


def fit(cut: Cut, n: int, k: int, activation: str, reads: bool) -> Cut:
    """A cut no larger than the layer, half as wide for two tiles of sums, and with room in registers where the end
    reads a tile of numbers (`reads`)."""
    columns = cut.COLUMNS // (2 if activation in _GATED else 1)
    columns = max(16, min(columns, 128 if reads else 256, power_of_2(n)))
    depth = max(16, min(cut.DEPTH, power_of_2(k)))
    if k % 16:  # numbers come one by one, and addresses fill registers
        return Cut(min(cut.ROWS, 64), min(columns, 64), min(depth, 32), 8, min(cut.num_stages, 3))
    return cut._replace(COLUMNS=columns, DEPTH=depth)


@remembered
@triton.jit(do_not_specialize=["rows", "tokens"])
def _linear(
    x_ptr, weight_ptr, bias, residual, gate, y_ptr, rows, tokens, n, k,
    ACTIVATION: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    TWO: tl.constexpr = ACTIVATION == "geglu" or ACTIVATION == "swiglu"
    blocks = tl.cdiv(n, COLUMNS)
    in_group = _GROUP * blocks
    top = tl.program_id(0) // in_group * _GROUP
    height = tl.minimum(tl.cdiv(rows, ROWS) - top, _GROUP)
    place = tl.program_id(0) % in_group
    first = (top + place % height).to(tl.int64) * ROWS
    left = place // height * COLUMNS
    row = tl.arange(0, ROWS)
    column = left + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    in_rows = (row < rows - first)[:, None]
    in_columns = (column < n)[None, :]

    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    g = tl.zeros([ROWS, COLUMNS], tl.float32)
    if TMA:
        at_row = first.to(tl.int32)
        for start in range(0, k, DEPTH):
            x = x_ptr.load([at_row, start])
            y = tl.dot(x, weight_ptr.load([left, start]).T, y)
            if TWO:
                g = tl.dot(x, weight_ptr.load([n + left, start]).T, g)
    else:
        x_at = x_ptr + first * k + row[:, None] * k + depth[None, :]
        w_at = weight_ptr + column.to(tl.int64)[None, :] * k + depth[:, None]
        half = tl.cast(n, tl.int64) * k  # from a value's row of the weight to its gate's
        for start in range(0, k, DEPTH):
            there = depth < k - start
            x = tl.load(x_at, in_rows & there[None, :], other=0.0)
            w_there = in_columns & there[:, None]
            y = tl.dot(x, tl.load(w_at, w_there, other=0.0), y)
            if TWO:
                g = tl.dot(x, tl.load(w_at + half, w_there, other=0.0), g)
            x_at += DEPTH
            w_at += DEPTH

    if bias is not None:
        y += vector(bias, column, n)
        if TWO:
            g += vector(bias + n, column, n)
    y = activate(y, g, ACTIVATION)
    inside = in_rows & in_columns
    if gate is not None:
        sample = first // tokens + ((first % tokens).to(tl.int32) + row) // tokens
        y *= tl.load(gate + sample[:, None] * n + column[None, :], inside, other=0.0).to(tl.float32)
    at = first * n + row[:, None] * n + column[None, :]
    if residual is not None:
        y += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


def facts(size: int, tokens: int, n: int, k: int, activation: str, reads: bool) -> str:
    """What a table tells layers apart by: bytes of a number, tokens of a sample, rows of the weight, and what
    follows."""
    return configs.key(bytes=size, tokens=configs.bucket(tokens), n=n, k=k, **{activation: 1}, reads=int(reads))


def _call(
    x: Tensor, weight: Tensor, activation: str, residual: Tensor | None, gate: Tensor | None
) -> tuple[int, int, int, int, str, bool]:
    reads = residual is not None or gate is not None
    return x.element_size(), x.numel() // (x.shape[0] * x.shape[-1]), *weight.shape, activation, reads  # type: ignore[return-value]


def tuning(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None,
    arch: int,
) -> tuple[str, list[configs.Shape]]:  # fmt: skip
    """For the op's arguments: the entry of the table that is theirs, and the shapes to try for it. The empty one is the
    library's product."""
    cuts = [cut._asdict() for cut in CUTS if arch >= 90 or not cut.TMA] if x.element_size() == 2 else []
    return facts(*_call(x, weight, activation, residual, gate)), [{}, *cuts]


@functools.cache
def _found(call: tuple[int, int, int, int, str, bool], arch: int) -> configs.Shape:
    entry = configs.tuned("linear", facts(*call), arch)
    return {} if entry is None else entry.shape


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    """activation(x weight^T + bias) * gate + residual. x: [B, ..., K], gate: [B, N]. All but weight contiguous."""
    call = _call(x, weight, activation, residual, gate)
    shape = configs.on_trial("linear", lambda: facts(*call))
    shape = _found(call, configs.architecture(x.device)) if shape is None else shape
    if not shape or x.dtype == torch.float32:  # for which there are no tensor cores
        return _by_library(x, weight, bias, activation, residual, gate)
    return fused(x, weight, bias, activation, residual, gate, Cut(**shape))


def _by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    # cuBLAS has that of GELU's forms, with a bias, and to 16 bits: its tanh is approximate.
    if activation == "gelu_tanh" and bias is not None and x.is_cuda and x.dtype != torch.float32:
        y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        y, activation = y.view(*x.shape[:-1], -1), "none"
    else:
        y = F.linear(x, weight, bias)
    if activation == "none" and residual is None and gate is None:
        return y
    out = (
        y if activation not in _GATED else torch.empty(*x.shape[:-1], len(weight) // 2, device=x.device, dtype=x.dtype)
    )
    return epilogue(y, None, None, activation, gate, residual, out)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None,
    cut: Cut,
) -> Tensor:  # fmt: skip
    """`linear` in one kernel."""
    k, n = weight.shape[1], len(weight) // (2 if activation in _GATED else 1)
    y = torch.empty(*x.shape[:-1], n, device=x.device, dtype=x.dtype)
    if y.numel():
        rows = y.numel() // n
        weight = weight.contiguous()
        aligned = not any(t.storage_offset() * t.element_size() % 16 for t in (x, weight))
        cut = fit(cut if aligned else cut._replace(TMA=0), n, k, activation, residual is not None or gate is not None)
        source, matrix = x, weight
        if cut.TMA:
            source = TensorDescriptor.from_tensor(x.flatten(0, -2), [cut.ROWS, cut.DEPTH])
            matrix = TensorDescriptor.from_tensor(weight, [cut.COLUMNS, cut.DEPTH])
        with on_device(x):
            _linear[(cdiv(rows, cut.ROWS) * cdiv(n, cut.COLUMNS),)](
                source, matrix, bias, residual, gate, y, rows, rows // x.shape[0], n, k, ACTIVATION=activation,
                **cut._asdict(), enable_fp_fusion=True,
            )  # fmt: skip
    return y

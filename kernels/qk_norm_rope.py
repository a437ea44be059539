"""RMSNorm and rotary embedding of the heads of queries and keys, both in one launch.

A tile of heads is held as the two elements of every pair, so that a rotation needs no neighbour: the halves of a head
are two loads, interleaved pairs one load that is split in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, on_device, power_of_2
from .launch import remembered

_TILE = 4096  # elements of a program


@triton.jit
def _load_pairs(ptr, row, mask, width, half, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(a, b), each [ROWS, HALF] in float32, of the pairs of rows that begin at ptr + row. An odd width, which nothing
    rotates, is read as interleaved: its last pair has one element."""
    c = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(ptr + row + both, mask & (both < width), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, [ROWS, HALF, 2]))
    else:
        a = tl.load(ptr + row + c, mask & (c < half), other=0.0).to(tl.float32)
        b = tl.load(ptr + row + half + c, mask & (c < half), other=0.0).to(tl.float32)
        return a, b


@triton.jit
def _store_pairs(ptr, row, mask, a, b, width, half, ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        x = tl.reshape(tl.join(a, b), [ROWS, 2 * HALF])
        tl.store(ptr + row + both, x.to(ptr.dtype.element_ty), mask & (both < width))
    else:
        c = tl.arange(0, HALF)[None, :]
        tl.store(ptr + row + c, a.to(ptr.dtype.element_ty), mask & (c < half))
        tl.store(ptr + row + half + c, b.to(ptr.dtype.element_ty), mask & (c < half))


@triton.jit
def _heads(
    x, out, weight, cos, sin, eps, rows, heads, tokens, width, half,
    ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = row < rows
    a, b = _load_pairs(x, row * width, mask, width, half, ROWS, HALF, INTERLEAVED)
    if weight is not None:
        square = tl.sum(a * a + b * b, axis=1) / tl.cast(width, tl.float32)
        scale = tl.rsqrt(square + tl.cast(eps, tl.float32))[:, None]
        first = tl.zeros([1, 1], tl.int64)
        wa, wb = _load_pairs(weight, first, first == 0, width, half, 1, HALF, INTERLEAVED)
        a *= scale * wa
        b *= scale * wb
    if cos is not None:
        at = (row // heads) % tokens * width
        cos_a, cos_b = _load_pairs(cos, at, mask, width, half, ROWS, HALF, INTERLEAVED)
        sin_a, sin_b = _load_pairs(sin, at, mask, width, half, ROWS, HALF, INTERLEAVED)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    _store_pairs(out, row * width, mask, a, b, width, half, ROWS, HALF, INTERLEAVED)


@remembered
@triton.jit(do_not_specialize=["q_rows", "k_rows", "q_heads", "k_heads", "tokens"])
def _qk_norm_rope(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, eps, q_rows, k_rows, q_heads, k_heads, tokens, width, half,
    ROWS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _heads(q, q_out, q_weight, cos, sin, eps, q_rows, q_heads, tokens, width, half, ROWS, HALF, INTERLEAVED)
    else:
        _heads(k, k_out, k_weight, cos, sin, eps, k_rows, k_heads, tokens, width, half, ROWS, HALF, INTERLEAVED)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(q, k), normalised where there is a weight, rotated where there are angles."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _, tokens, _, width = q.shape
    if q.numel() or k.numel():
        half = power_of_2((width + 1) // 2)
        rows = min(128, max(1, _TILE // (2 * half)))
        counts = (q.numel() // width, k.numel() // width)
        heads = [max(1, t.shape[2]) for t in (q, k)]  # none has no rows either, but is divided by
        with on_device(q):
            _qk_norm_rope[(cdiv(max(counts), rows), 2)](
                q, k, q_out, k_out, q_weight, k_weight, cos, sin, eps, *counts, *heads, tokens, width,
                width // 2, ROWS=rows, HALF=half, INTERLEAVED=interleaved or width % 2 == 1, enable_fp_fusion=True,
            )  # fmt: skip
    return q_out, k_out

"""Attention that keeps its scores on the chip (Dao et al. 2022), for any strides but that of a head's numbers.

A program does a block of queries of one head, over all keys, under a running maximum and sum. How the keys are cut
depends on the head alone, so that a sample's result does not depend on its batch. A head whose size is just above a
power of two is cut into two tiles, 80 = 64 + 16 and 160 = 128 + 32, where one would be padded to twice as much.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device

_LOG2E = tl.constexpr(1.4426950408889634)


class _Cut(NamedTuple):
    """How a head is cut; compile-time. All fit into 99 KB of shared memory, what a multiprocessor has at least."""

    D1: int
    D2: int  # the second tile, 0 for none
    QUERIES: int
    KEYS: int
    num_warps: int
    num_stages: int


def _cut(dim: int, queries: int, size: int, masked: bool) -> _Cut:
    """For `size` bytes a number."""
    first = max(16, triton.next_power_of_2(dim))
    second = max(16, triton.next_power_of_2(dim - first // 2))
    two = dim > 64 and second < first // 2  # below, what is padded costs less than a second product
    d1, d2 = (first // 2, second) if two else (first, 0)
    if size == 4:  # no tensor cores in full precision: products in registers, which small tiles leave room for
        most, keys = (32, 32) if d1 <= 128 else (16, 16)
    else:
        most, keys = (128, 64) if d1 <= 64 else (128, 32) if d1 <= 128 else (32, 32)
    block = max(16, min(most, triton.next_power_of_2(queries)))
    if masked and block < 64:  # few rows, spread over many threads: with a mask's entries 64 keys spilled
        keys = min(keys, 32)
    warps = 8 if d1 * block >= 1 << 13 else 4
    return _Cut(d1, d2, block, keys, warps, 2 if d1 <= 128 else 1)


@triton.jit
def _load(base, step, count, first, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Rows [0, ROWS) of a head, their numbers [first, first + WIDTH); zero outside `count` rows and D numbers."""
    row = tl.arange(0, ROWS)
    d = first + tl.arange(0, WIDTH)
    inside = (row < count)[:, None]
    if D % WIDTH != 0:
        inside = inside & (d < D)[None, :]
    return tl.load(base + row[:, None] * step + d[None, :], inside, other=0.0)


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, out_ptr, scale, q_sample, q_token, q_head, k_sample, k_token, k_head,
    v_sample, v_token, v_head, mask_ptr, m_sample, m_head, m_query, m_key, heads, queries, keys,
    MASKED: tl.constexpr, KEEPS: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Strides count units of UNIT elements, but for the mask's: how the compiler learns that rows begin where wide
    loads can. KEEPS: the mask is bool."""
    blocks = tl.cdiv(queries, QUERIES)
    first = (tl.program_id(0) % blocks).to(tl.int64) * QUERIES
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    q_ptr += (sample * q_sample + head * q_head + first * q_token) * UNIT
    k_ptr += (sample * k_sample + head * k_head) * UNIT
    v_ptr += (sample * v_sample + head * v_head) * UNIT
    if MASKED:
        mask_ptr += sample * m_sample + head * m_head + first * m_query
    left = queries - first
    factor = tl.cast(scale, tl.float32)

    q1 = _load(q_ptr, q_token * UNIT, left, 0, D, D1, QUERIES)
    out1 = tl.zeros([QUERIES, D1], tl.float32)
    if D2 > 0:
        q2 = _load(q_ptr, q_token * UNIT, left, D1, D, D2, QUERIES)
        out2 = tl.zeros([QUERIES, D2], tl.float32)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        rest = keys - start
        scores = tl.dot(q1, tl.trans(_load(k_ptr, k_token * UNIT, rest, 0, D, D1, KEYS)), input_precision="ieee")
        if D2 > 0:
            k2 = tl.trans(_load(k_ptr, k_token * UNIT, rest, D1, D, D2, KEYS))
            scores = tl.dot(q2, k2, scores, input_precision="ieee")
        scores *= factor
        counts = (tl.arange(0, KEYS) < rest)[None, :]
        if MASKED:
            row, key = tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :]
            entry = tl.load(mask_ptr + row * m_query + key * m_key, (row < left) & counts, other=0)
            if KEEPS:
                counts = counts & (entry != 0)
            else:
                scores += entry.to(tl.float32) * _LOG2E
            mask_ptr += KEYS * m_key
        scores = tl.where(counts, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no score yet that counts: weights are zero, not NaN
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        highest = higher
        weights = weights.to(v_ptr.dtype.element_ty)
        v1 = _load(v_ptr, v_token * UNIT, rest, 0, D, D1, KEYS)
        out1 = tl.dot(weights, v1, out1 * decay[:, None], input_precision="ieee")
        if D2 > 0:
            v2 = _load(v_ptr, v_token * UNIT, rest, D1, D, D2, KEYS)
            out2 = tl.dot(weights, v2, out2 * decay[:, None], input_precision="ieee")
        k_ptr += KEYS * UNIT * k_token
        v_ptr += KEYS * UNIT * v_token

    share = 1 / tl.where(total == 0, 1.0, total)  # without a key the result is zero already
    row = tl.arange(0, QUERIES)
    out_ptr += ((sample * queries + first) * heads + head) * D
    place = out_ptr + row[:, None] * (heads * D)
    d1 = tl.arange(0, D1)
    inside = (row < left)[:, None]
    tl.store(place + d1[None, :], (out1 * share[:, None]).to(out_ptr.dtype.element_ty), inside & (d1 < D)[None, :])
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        tl.store(place + d2[None, :], (out2 * share[:, None]).to(out_ptr.dtype.element_ty), inside & (d2 < D)[None, :])


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + mask) v; q: [B, S, H, D]; k, v: [B, T, H, D], last stride 1; mask: [B, H, S, T], bool or
    floating, any strides. Returns [B, S, H D]."""
    batch, queries, heads, dim = q.shape
    out = torch.empty(batch, queries, heads * dim, device=q.device, dtype=q.dtype)
    if not out.numel():
        return out
    cut = _cut(dim, queries, q.element_size(), mask is not None)
    strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    with on_device(q):
        _attention[(triton.cdiv(queries, cut.QUERIES) * heads * batch,)](
            q, k, v, out, scale * _LOG2E.value, *(stride // unit for stride in strides),
            mask, *((0,) * 4 if mask is None else mask.stride()), heads, queries, k.shape[1],
            MASKED=mask is not None, KEEPS=mask is not None and mask.dtype == torch.bool,
            UNIT=unit, D=dim, **cut._asdict(), enable_fp_fusion=True,
        )  # fmt: skip
    return out

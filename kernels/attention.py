"""Attention that keeps its scores on the chip (Dao et al. 2022), for any strides but that of a head's numbers.

A program does a block of queries of one head, over all keys, under a running maximum and sum. Only the last block of
keys is masked, and is no wider than it must be: 77 keys are 64 and 16. Where all keys fit into one block a program may
keep them, and the queries stream by instead. How the keys are cut depends on the shape of a head alone, so that a
sample's result does not depend on its batch. A head whose size is just above a power of two is cut into two tiles,
80 = 64 + 16 and 160 = 128 + 32, where one would be padded to twice as much.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_cuts import cut_of, is_large, tiles, tuning
from .attention_products import attention_by_products
from .common import cdiv, on_device, power_of_2
from .launch import remembered

__all__ = ["attention", "tuning"]

_LOG2E = tl.constexpr(1.4426950408889634)
_SMALLEST = 1e-30  # in place of a scale of zero, which would make NaN of the -inf of a key that does not count


@triton.jit
def _load(
    base, step, count, first, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """Rows [0, ROWS) of a head, their numbers [first, first + WIDTH); zero outside D numbers and, if BOUNDED, outside
    `count` rows."""
    row = tl.arange(0, ROWS)
    d = first + tl.arange(0, WIDTH)
    at = base + row[:, None] * step + d[None, :]
    if BOUNDED:
        inside = (row < count)[:, None]
        if D % WIDTH != 0:
            inside = inside & (d < D)[None, :]
        return tl.load(at, inside, other=0.0)
    elif D % WIDTH != 0:
        return tl.load(at, (d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(
    base, step, count, first, values, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """What `_load` would read back."""
    row = tl.arange(0, ROWS)
    d = first + tl.arange(0, WIDTH)
    at = base + row[:, None] * step + d[None, :]
    values = values.to(base.dtype.element_ty)
    if BOUNDED:
        tl.store(at, values, (row < count)[:, None] & (d < D)[None, :])
    elif D % WIDTH != 0:
        tl.store(at, values, (d < D)[None, :])
    else:
        tl.store(at, values)


@triton.jit
def _weights(
    scores, highest, factor, mask_ptr, m_query, m_key, left, rest, MASKED: tl.constexpr, KEEPS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """exp(scores - the highest yet), what earlier sums are to be multiplied by, and the highest score with these. Of
    the keys only `rest` are there, if BOUNDED."""
    row, key = tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :]
    there = key < rest
    unit = factor  # what is left to multiply scores by: one instruction with the subtraction
    if MASKED:
        entry = tl.load(mask_ptr + row * m_query + key * m_key, (row < left) & there, other=0)
        if KEEPS:
            scores = tl.where(entry != 0, scores, float("-inf"))
        else:
            scores = scores * factor + entry.to(tl.float32) * _LOG2E
            unit = 1.0
    if BOUNDED:
        scores = tl.where(there, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1) * unit)
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # no score yet that counts: weights are zero, not NaN
    return tl.exp2(scores * unit - shift[:, None]), tl.exp2(highest - shift), higher


@triton.jit
def _attend(
    q1, q2, out1, out2, highest, total, k_ptr, k_token, v_ptr, v_token, part, factor, mask_ptr, m_query, m_key, left,
    rest, MASKED: tl.constexpr, KEEPS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    VALUES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BOUNDED: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the sums. FIRST: there are no sums yet, nor other blocks to load while this is done."""
    if FIRST:
        v1 = _load(v_ptr, v_token, rest, part, D, VALUES, KEYS, BOUNDED)
        if D2 > 0:
            v2 = _load(v_ptr, v_token, rest, D1, D, D2, KEYS, BOUNDED)
    k1 = _load(k_ptr, k_token, rest, 0, D, D1, KEYS, BOUNDED)
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        k2 = _load(k_ptr, k_token, rest, D1, D, D2, KEYS, BOUNDED)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
    weights, decay, highest = _weights(
        scores, highest, factor, mask_ptr, m_query, m_key, left, rest, MASKED, KEEPS, QUERIES, KEYS, BOUNDED
    )
    total = total * decay + tl.sum(weights, axis=1)
    if not FIRST:
        out1 = out1 * decay[:, None]
        if D2 > 0:
            out2 = out2 * decay[:, None]
    weights = weights.to(v_ptr.dtype.element_ty)
    if not FIRST:
        v1 = _load(v_ptr, v_token, rest, part, D, VALUES, KEYS, BOUNDED)
        if D2 > 0:
            v2 = _load(v_ptr, v_token, rest, D1, D, D2, KEYS, BOUNDED)
    out1 = tl.dot(weights, v1, out1, input_precision="ieee")
    if D2 > 0:
        out2 = tl.dot(weights, v2, out2, input_precision="ieee")
    return out1, out2, highest, total


@remembered
@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, out_ptr, scale, q_sample, q_token, q_head, k_sample, k_token, k_head,
    v_sample, v_token, v_head, mask_ptr, m_sample, m_head, m_query, m_key, heads, queries, keys,
    MASKED: tl.constexpr, KEEPS: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, LAST: tl.constexpr,
    BOUNDED: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Strides count units of UNIT elements, but for the mask's: how the compiler learns that rows begin where wide
    loads can. KEEPS: the mask is bool. LOOP: blocks of KEYS keys come before the last one of LAST keys, if it is not 0.
    The last block is not full if BOUNDED."""
    VALUES: tl.constexpr = D1 // PARTS
    part = tl.program_id(0) % PARTS * VALUES
    program = tl.program_id(0) // PARTS
    blocks = tl.cdiv(queries, QUERIES)
    sample = (program // blocks // heads).to(tl.int64)
    head = (program // blocks % heads).to(tl.int64)
    left = queries - program % blocks * QUERIES
    first = (queries - left).to(tl.int64)
    k_token *= UNIT
    v_token *= UNIT
    q_ptr += (sample * q_sample + head * q_head + first * q_token) * UNIT
    k_ptr += (sample * k_sample + head * k_head) * UNIT
    v_ptr += (sample * v_sample + head * v_head) * UNIT
    if MASKED:
        mask_ptr += sample * m_sample + head * m_head + first * m_query
    factor = tl.cast(scale, tl.float32)

    q1 = _load(q_ptr, q_token * UNIT, left, 0, D, D1, QUERIES, True)
    out1 = tl.zeros([QUERIES, VALUES], tl.float32)
    q2, out2 = q1, out1
    if D2 > 0:
        q2 = _load(q_ptr, q_token * UNIT, left, D1, D, D2, QUERIES, True)
        out2 = tl.zeros([QUERIES, D2], tl.float32)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if LOOP:
        ALL: tl.constexpr = BOUNDED and LAST == 0
        for start in range(0, keys if ALL else keys - keys % KEYS, KEYS):
            out1, out2, highest, total = _attend(
                q1, q2, out1, out2, highest, total, k_ptr, k_token, v_ptr, v_token, part, factor, mask_ptr, m_query,
                m_key, left, keys - start, MASKED, KEEPS, D, D1, D2, VALUES, QUERIES, KEYS, ALL, False,
            )  # fmt: skip
            k_ptr += KEYS * k_token
            v_ptr += KEYS * v_token
            if MASKED:
                mask_ptr += KEYS * m_key
    if LAST > 0:
        out1, out2, highest, total = _attend(
            q1, q2, out1, out2, highest, total, k_ptr, k_token, v_ptr, v_token, part, factor, mask_ptr, m_query,
            m_key, left, keys % KEYS if LOOP else keys, MASKED, KEEPS, D, D1, D2, VALUES, QUERIES, LAST, BOUNDED,
            not LOOP,
        )  # fmt: skip

    share = (1 / tl.where(total == 0, 1.0, total))[:, None]  # without a key the result is zero already
    out_ptr += ((sample * queries + first) * heads + head) * D
    _store(out_ptr, heads * D, left, part, out1 * share, D, VALUES, QUERIES, True)
    if D2 > 0:
        _store(out_ptr, heads * D, left, D1, out2 * share, D, D2, QUERIES, True)


@remembered
@triton.jit
def _attention_to_few(
    q_ptr, k_ptr, v_ptr, out_ptr, scale, q_sample, q_token, q_head, k_sample, k_token, k_head,
    v_sample, v_token, v_head, mask_ptr, m_sample, m_head, m_query, m_key, heads, queries, keys, blocks,
    MASKED: tl.constexpr, KEEPS: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BOUNDED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The keys lie in one block and stay; `blocks` blocks of queries stream by, the next one loaded while this one is
    done. WHOLE: all of them are full. The rest as in `_attention`."""
    chunks = tl.cdiv(queries, QUERIES * blocks)
    program = tl.program_id(0)
    sample = (program // chunks // heads).to(tl.int64)
    head = (program // chunks % heads).to(tl.int64)
    first = program % chunks * blocks * QUERIES
    k_ptr += (sample * k_sample + head * k_head) * UNIT
    v_ptr += (sample * v_sample + head * v_head) * UNIT
    q_ptr += (sample * q_sample + head * q_head + first.to(tl.int64) * q_token) * UNIT
    out_ptr += ((sample * queries + first) * heads + head) * D
    if MASKED:
        mask_ptr += sample * m_sample + head * m_head + first.to(tl.int64) * m_query
    factor = tl.cast(scale, tl.float32)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)

    k1 = tl.trans(_load(k_ptr, k_token * UNIT, keys, 0, D, D1, KEYS, BOUNDED))
    v1 = _load(v_ptr, v_token * UNIT, keys, 0, D, D1, KEYS, BOUNDED)
    k2, v2 = k1, v1
    if D2 > 0:
        k2 = tl.trans(_load(k_ptr, k_token * UNIT, keys, D1, D, D2, KEYS, BOUNDED))
        v2 = _load(v_ptr, v_token * UNIT, keys, D1, D, D2, KEYS, BOUNDED)
    for block in range(0, min(blocks, tl.cdiv(queries - first, QUERIES))):
        left = queries - first - block * QUERIES
        q1 = _load(q_ptr, q_token * UNIT, left, 0, D, D1, QUERIES, not WHOLE)
        scores = tl.dot(q1, k1)
        if D2 > 0:
            q2 = _load(q_ptr, q_token * UNIT, left, D1, D, D2, QUERIES, not WHOLE)
            scores = tl.dot(q2, k2, scores)
        weights, _, _ = _weights(
            scores, highest, factor, mask_ptr, m_query, m_key, left, keys, MASKED, KEEPS, QUERIES, KEYS, BOUNDED
        )
        total = tl.sum(weights, axis=1)
        share = (1 / tl.where(total == 0, 1.0, total))[:, None]
        weights = weights.to(v_ptr.dtype.element_ty)
        _store(out_ptr, heads * D, left, 0, tl.dot(weights, v1) * share, D, D1, QUERIES, not WHOLE)
        if D2 > 0:
            _store(out_ptr, heads * D, left, D1, tl.dot(weights, v2) * share, D, D2, QUERIES, not WHOLE)
        q_ptr += QUERIES * UNIT * q_token
        out_ptr += QUERIES * heads * D
        if MASKED:
            mask_ptr += QUERIES * m_query


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + mask) v; q: [B, S, H, D]; k, v: [B, T, H, D], last stride 1; mask: [B, H, S, T], bool or
    floating, any strides. Returns [B, S, H D]."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    out = torch.empty(batch, queries, heads * dim, device=q.device, dtype=q.dtype)
    if not out.numel():
        return out
    strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    arch = configs.architecture(q.device)
    cut = cut_of(q, keys, mask, unit > 1, arch)
    if cut is None:
        attention_by_products(q, k, v, out.unflatten(2, (heads, dim)), scale * _LOG2E.value)
        return out
    if scale < 0:  # the highest score is that of the highest product
        q, scale = -q, -scale
    d1, d2, size = *tiles(dim), q.element_size()
    tensors = (
        q, k, v, out, max(scale * _LOG2E.value, _SMALLEST), *(stride // unit for stride in strides),
        mask, *((0,) * 4 if mask is None else mask.stride()), heads, queries, keys,
    )  # fmt: skip
    shared = {
        "MASKED": mask is not None, "KEEPS": mask is not None and mask.dtype == torch.bool, "UNIT": unit, "D": dim,
        "D1": d1, "D2": d2, "QUERIES": cut.QUERIES, "KEYS": cut.KEYS, "num_warps": cut.num_warps,
        "num_stages": cut.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    blocks = cdiv(queries, cut.QUERIES)
    with on_device(q):
        if cut.BLOCKS:
            _attention_to_few[(cdiv(blocks, cut.BLOCKS) * heads * batch,)](
                *tensors, cut.BLOCKS, BOUNDED=keys < cut.KEYS, WHOLE=queries % cut.QUERIES == 0, **shared
            )
        else:
            rest = keys if keys <= cut.KEYS else keys % cut.KEYS  # one block only is the last one, and needs no loop
            last = max(16, power_of_2(rest))
            if rest == 0 or (keys > cut.KEYS and (size == 4 or cut.QUERIES < 64 or not is_large(arch))):
                last = 0  # elsewhere the code of two blocks takes too many registers
            _attention[(cut.PARTS * blocks * heads * batch,)](
                *tensors, PARTS=cut.PARTS, LAST=last, BOUNDED=rest not in (0, last), LOOP=keys > cut.KEYS, **shared
            )
    return out

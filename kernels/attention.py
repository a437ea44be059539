"""Attention that keeps its scores on the chip (Dao et al. 2022), for any strides but that of a head's numbers.

A program does a block of queries of one head, over all keys, under a running maximum and sum. Only the last block of
keys is masked, and is no wider than it must be: 77 keys are 64 and 16. Where all keys fit into one block a program may
keep them, and the queries stream by instead. How the keys are cut depends on the shape of a head alone, so that a
sample's result does not depend on its batch. A head whose size is just above a power of two is cut into two tiles,
80 = 64 + 16 and 160 = 128 + 32, where one would be padded to twice as much.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import on_device

_LOG2E = tl.constexpr(1.4426950408889634)
_SMALLEST = 1e-30  # in place of a scale of zero, which would make NaN of the -inf of a key that does not count


class Cut(NamedTuple):
    """How the work is cut; compile-time."""

    QUERIES: int
    KEYS: int
    PARTS: int  # programs that share a head's values, each with all of its scores
    BLOCKS: int  # blocks of queries that stream by one block of keys; 0: the keys stream by one block of queries
    num_warps: int
    num_stages: int


def tiles(dim: int) -> tuple[int, int]:
    """The widths of a head's tiles, 0 for no second one. Below 64, what is padded costs less than a second product."""
    first = max(16, triton.next_power_of_2(dim))
    second = max(16, triton.next_power_of_2(dim - first // 2))
    return (first // 2, second) if dim > 64 and second < first // 2 else (first, 0)


def _large(arch: int) -> bool:
    """Whether four warps together multiply 64 rows out of shared memory, of which there is much: Hopper and after."""
    return configs.shared_memory(arch) >= 227 * 1024


def default_cut(dim: int, queries: int, keys: int, size: int, masked: int, aligned: bool, arch: int) -> Cut:
    """For `size` bytes a number, in heads that begin where wide loads can if `aligned`: what serves where nothing was
    measured."""
    d1, _ = tiles(dim)
    block = max(16, triton.next_power_of_2(queries))
    if size == 4:  # no tensor cores in full precision: products in registers, which small tiles leave room for
        most, wide = (32, 32) if d1 <= 128 else (16, 16)
        block = min(block, most)
        return Cut(block, wide, 1, 0, 8 if d1 * block >= 1 << 11 else 4, 2 if d1 <= 128 else 1)
    if _large(arch) and (block >= 64 or d1 > 128):
        block = 128 if queries > 512 and d1 <= 256 else 64
        if d1 > 128:  # four more warps hold half of the sums
            return Cut(block, 32, 2 if d1 > 256 else 1, 0, 8, 2)
        # 64 queries are four warps, and leave room for another program that multiplies while this one does not.
        return Cut(block, 64 if aligned else 32, 1, 0, block // 16, 3 if block == 128 else 2)
    most, wide = (128, 64) if d1 <= 64 else (128, 32) if d1 <= 128 else (32, 32)
    block = min(block, most)
    if not aligned or (masked and block < 64):  # few rows, spread over many threads: 64 keys spilled
        wide = min(wide, 32)
    return Cut(block, wide, 2 if d1 > 256 else 1, 0, 8 if d1 * block >= 1 << 13 else 4, 2 if d1 <= 128 else 1)


def _call(q: Tensor, keys: int, mask: Tensor | None) -> tuple[int, int, int, int, int]:
    """What shapes are chosen by: dim, queries, keys, bytes a number, and the mask: 0 none, 1 bool, 2 added."""
    return q.shape[3], q.shape[1], keys, q.element_size(), 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def facts(dim: int, queries: int, keys: int, size: int, masked: int) -> str:
    """What a table of shapes tells calls apart by."""
    return configs.key(bytes=size, dim=dim, queries=configs.bucket(queries), keys=configs.bucket(keys), masked=masked)


def candidates(dim: int, queries: int, keys: int, size: int, masked: int, arch: int) -> Iterator[Cut]:
    """The shapes that are worth timing, by what can be known beforehand: 64 queries are what four warps multiply at
    once; a thread has 255 registers for the sums, the scores and the weights of a block."""
    d1, d2 = tiles(dim)
    few = max(16, min(32, triton.next_power_of_2(queries)))
    for block in () if size != 2 else (64, 128) if queries > 64 else (few, 64):
        for wide in (32, 64, 128, 256):
            if wide >= max(64, 2 * keys) or (wide == 32 and d1 <= 64 and keys > 32) or (wide == 256 and keys > 256):
                continue
            for parts in (1, 2) if d1 > 256 else (1,):
                for warps in (1, 4) if block < 64 else (block // 16 if d1 <= 128 else 8,):
                    sums, scores = block * (d1 // parts + d2), block * wide
                    if sums + scores * 3 // 2 > 192 * 32 * warps:
                        continue
                    for stages in (2, 3) if wide < keys else (1,):
                        stored = (d1 + d2) * (block + stages * wide) + (d1 // parts + d2) * stages * wide
                        if size * stored <= configs.shared_memory(arch):
                            yield Cut(block, wide, parts, 0, warps, stages)
                    # Keys that stay: 3 stages, as with 2 no block is loaded ahead; what is stored passes through.
                    # With what is added to their scores their registers do not do.
                    stored = (d1 + d2) * (3 * block + 2 * wide) + d1 * block
                    if masked < 2 and d1 <= 128 and wide >= keys and size * stored <= configs.shared_memory(arch):
                        for blocks in (2, 4, 8):
                            if (blocks - 1) * block < queries:
                                yield Cut(block, wide, 1, blocks, warps, 3)


def tuning(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, arch: int
) -> tuple[str, list[configs.Shape]]:
    """For the op's arguments: the entry of the table that is theirs, and the shapes to try for it."""
    call = _call(q, k.shape[1], mask)
    return facts(*call), [cut._asdict() for cut in candidates(*call, arch)]


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


@functools.lru_cache(1024)
def _found(call: tuple[int, int, int, int, int], arch: int) -> configs.Tuned | None:
    return configs.tuned("attention", facts(*call), arch)


def measured(q: Tensor, keys: int, mask: Tensor | None) -> configs.Tuned | None:
    """What was measured of such a call on this architecture, or None."""
    return _found(_call(q, keys, mask), configs.architecture(q.device))


def cut_of(q: Tensor, keys: int, mask: Tensor | None, aligned: bool, arch: int) -> Cut:
    """The launch shape for a call: the one on trial, else what was measured as fastest, else the default. All that was
    measured is aligned."""
    call = _call(q, keys, mask)
    shape = configs.on_trial("attention", lambda: facts(*call))
    if shape is None and aligned and (found := _found(call, arch)) is not None:
        shape = found.shape
    return default_cut(*call, aligned, arch) if shape is None else Cut(**shape)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + mask) v; q: [B, S, H, D]; k, v: [B, T, H, D], last stride 1; mask: [B, H, S, T], bool or
    floating, any strides. Returns [B, S, H D]."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    out = torch.empty(batch, queries, heads * dim, device=q.device, dtype=q.dtype)
    if not out.numel():
        return out
    if scale < 0:  # the highest score is that of the highest product
        q, scale = -q, -scale
    d1, d2, size = *tiles(dim), q.element_size()
    strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    arch = configs.architecture(q.device)
    cut = cut_of(q, keys, mask, unit > 1, arch)
    tensors = (
        q, k, v, out, max(scale * _LOG2E.value, _SMALLEST), *(stride // unit for stride in strides),
        mask, *((0,) * 4 if mask is None else mask.stride()), heads, queries, keys,
    )  # fmt: skip
    shared = {
        "MASKED": mask is not None, "KEEPS": mask is not None and mask.dtype == torch.bool, "UNIT": unit, "D": dim,
        "D1": d1, "D2": d2, "QUERIES": cut.QUERIES, "KEYS": cut.KEYS, "num_warps": cut.num_warps,
        "num_stages": cut.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    blocks = triton.cdiv(queries, cut.QUERIES)
    with on_device(q):
        if cut.BLOCKS:
            _attention_to_few[(triton.cdiv(blocks, cut.BLOCKS) * heads * batch,)](
                *tensors, cut.BLOCKS, BOUNDED=keys < cut.KEYS, WHOLE=queries % cut.QUERIES == 0, **shared
            )
        else:
            rest = keys if keys <= cut.KEYS else keys % cut.KEYS  # one block only is the last one, and needs no loop
            last = max(16, triton.next_power_of_2(rest))
            if rest == 0 or (keys > cut.KEYS and (size == 4 or cut.QUERIES < 64 or not _large(arch))):
                last = 0  # elsewhere the code of two blocks takes too many registers
            _attention[(cut.PARTS * blocks * heads * batch,)](
                *tensors, PARTS=cut.PARTS, LAST=last, BOUNDED=rest not in (0, last), LOOP=keys > cut.KEYS, **shared
            )
    return out

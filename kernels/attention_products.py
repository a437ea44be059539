"""Attention as two products of a library with a softmax between them, for heads too wide for one kernel.

With 512 numbers a head, as in the middle of a VAE, the sums of a block of queries fill a program's registers, and the
tensor cores wait. So the scores go through memory, a block of queries at a time, few enough to stay in the cache
between the product and the softmax. Blocks, and every product, are of one head: a sample's result does not depend on
its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, power_of_2
from .launch import remembered

_SCORES = 1 << 22  # at once, in float32: 16 MB of an L2 of 40 and more
_WEIGHTS = 1 << 25  # at once, in 16 bits; more of them, so that their product with the values fills the GPU
_WIDEST = 1 << 14  # scores that a program holds in its registers


@remembered
@triton.jit
def _softmax(scores_ptr, weights_ptr, factor, keys, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    """weights = exp2(scores factor), over its sum, one row a program. LOOP: in blocks, read twice."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * keys
    weights_ptr += row * keys
    at = tl.arange(0, BLOCK)
    factor = tl.cast(factor, tl.float32)
    if LOOP:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, keys, BLOCK):  # every lane its own maximum and sum
            scores = tl.load(scores_ptr + start + at, start + at < keys, other=0.0) * factor
            scores = tl.where(start + at < keys, scores, float("-inf"))
            higher = tl.maximum(highest, scores)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            sums = sums * tl.exp2(highest - shift) + tl.exp2(scores - shift)
            highest = higher
        top = tl.max(highest, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)  # no score that counts: weights are zero, not NaN
        total = tl.sum(sums * tl.exp2(highest - top), axis=0)
        share = 1 / tl.where(total == 0, 1.0, total)
        for start in range(0, keys, BLOCK):
            scores = tl.load(scores_ptr + start + at, start + at < keys, other=0.0) * factor
            weights = tl.exp2(scores - top) * share
            tl.store(weights_ptr + start + at, weights.to(weights_ptr.dtype.element_ty), start + at < keys)
    else:
        scores = tl.load(scores_ptr + at, at < keys, other=0.0) * factor
        scores = tl.where(at < keys, scores, float("-inf"))
        top = tl.max(scores, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores - top)
        total = tl.sum(weights, axis=0)
        weights *= 1 / tl.where(total == 0, 1.0, total)
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), at < keys)


def _fill(weights: Tensor, q: Tensor, k: Tensor, factor: float) -> None:
    """The weights of one block of queries. The scores live no longer than this: the next ones get their memory."""
    keys = k.shape[0]
    # No device but CUDA has a product whose result is of another type.
    scores = torch.mm(q, k.t(), out_dtype=torch.float32) if q.is_cuda else q.float() @ k.float().t()
    block = power_of_2(keys) if keys <= _WIDEST else _WIDEST // 4
    _softmax[(q.shape[0],)](
        scores, weights, factor, keys, BLOCK=block, LOOP=keys > _WIDEST, num_warps=max(4, min(16, block // 512)),
        enable_fp_fusion=True,
    )  # fmt: skip


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, out: Tensor, factor: float) -> None:
    """out = the weights of each query times v, each weight 2^(q k^T factor) over the sum of them; q, out: [B, S, H, D];
    k, v: [B, T, H, D], last stride 1."""
    queries, keys = q.shape[1], k.shape[1]
    most, few = max(1, _WEIGHTS // keys), max(1, _SCORES // keys)
    weights = torch.empty(min(most, queries), keys, device=q.device, dtype=q.dtype)
    with on_device(q):
        for sample in range(q.shape[0]):
            for head in range(q.shape[2]):
                query, key, value = (t[sample, :, head] for t in (q, k, v))
                for first in range(0, queries, most):
                    last = min(first + most, queries)
                    for start in range(first, last, few):
                        stop = min(start + few, last)
                        _fill(weights[start - first : stop - first], query[start:stop], key, factor)
                    torch.mm(weights[: last - first], value, out=out[sample, first:last, head])

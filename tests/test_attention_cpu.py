"""Attention in C++: blocks of every size, numbers of every kind, heads in turn or one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_attention import qkv

from diffkern import attention, use_backend
from diffkern.available import availability
from diffkern.op import OPS
from diffkern.testing import check, make

pytestmark = pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")


@pytest.mark.parametrize("queries", [1, 15, 16, 17, 33, 48, 64, 65, 130])
@pytest.mark.parametrize("keys", [1, 64, 65, 77, 129, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_every_size(queries, keys, dtype):
    """Vectors of queries that are full or not, one block of keys or several, and a last key that has no second one."""
    check(OPS["attention"], "cpu", (*qkv(3, queries, keys, 5, 24, dtype), None, None))


@pytest.mark.parametrize(
    ("dtype", "around"),  # the limit: of 528 words a key, or of 272 where two numbers are a word
    [(torch.float32, (490, 510)), (torch.bfloat16, (490, 510)), (torch.bfloat16, (961, 965))],
)
def test_keys_that_are_not_held_in_the_cache_at_once(dtype, around):
    """Many and wide keys are gathered a block at a time, few ones once for all queries of a head."""
    for keys in around:
        check(OPS["attention"], "cpu", (*qkv(1, 70, keys, 1, 512, dtype), None, None))


@pytest.mark.parametrize("dim", [8, 9, 31])
@pytest.mark.parametrize("keys", [5, 128, 129, 255])
def test_bfloat16_in_pairs(dim, keys):
    """Every key and every channel counts, and counts once: what the next key or channel holds does not."""
    q, k, v = qkv(1, 18, keys, 1, dim, torch.bfloat16)
    for key in (0, 1, keys - 2, keys - 1):
        only = torch.arange(keys) == key
        with use_backend("cpu"):
            assert torch.equal(attention(q, k, v, mask=only), v[0, key].expand(1, 18, 1, dim).flatten(2))
    for channel in (0, 1, dim - 2, dim - 1):
        one = torch.zeros_like(q)
        one[..., channel] = q[..., channel]
        check(OPS["attention"], "cpu", (one, k, v, 1.0, None))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_any_sign(scale, dtype):
    """The highest score is looked for before it is scaled; two blocks of keys, and one that is alone in its word."""
    q, k, v = qkv(2, 70, 129, 3, 24, dtype)
    mask = make((2, 3, 70, 129), "cpu", dtype, seed=3)
    for given in (None, mask, mask > 0):
        check(OPS["attention"], "cpu", (q, k, v, scale, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_near_the_ends_of_float32(dtype):
    """Only differences of scores are scaled: these may be as large as float32 goes, and so may a mask that is added."""
    q, k, v = qkv(1, 20, 130, 2, 8, dtype)
    lowest = torch.full((20, 130), torch.finfo(dtype).min).to(dtype)
    one = torch.arange(130) == torch.arange(20)[:, None] * 6
    key = F.one_hot(torch.arange(20) * 6, 130).to(dtype)
    with use_backend("cpu"):
        even = attention(q, k, v, mask=lowest)  # every score is lost in the mask: all keys weigh the same
        picked = attention(q, k, v, mask=lowest.masked_fill(one, 0))
        q[:], k[:] = 1, -1
        k[:, 100], q[..., 1:], k[..., 1:] = 1, 0, 0
        far = attention(q * 3e18, k * 1e20, v, 1.0)
    # The last place of a result, and of a mean of 130 values.
    exact = 1e-6 if dtype == torch.float32 else 2**-8
    mean = v.mean(1, keepdim=True).expand(-1, 20, -1, -1)
    torch.testing.assert_close(even.unflatten(2, (2, 8)), mean, rtol=0, atol=exact)
    assert torch.equal(picked, torch.einsum("st,bthd->bshd", key, v).flatten(2))
    assert torch.equal(far, v[:, 100:101].expand(-1, 20, -1, -1).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_that_are_subnormal(dtype):
    """The instruction that rounds to bfloat16 would take them for zero."""
    q, k, v = torch.zeros(3, 1, 4, 2, 40, dtype=dtype)
    v[:, 1, :, ::3] = -torch.finfo(dtype).smallest_normal
    with use_backend("cpu"):
        out = attention(q, k, v)
    assert torch.equal(out, (v[:, 1:2] / 4).expand(-1, 4, -1, -1).flatten(2))
    assert out.count_nonzero() == 4 * 2 * 14


@pytest.mark.parametrize("keys", [77, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_in_turn_or_one_after_the_other(keys, dtype):
    """Few keys of all heads are held at once, many of one head: a head alone has the same bits."""
    q, k, v = qkv(2, 130, keys, 6, 40, dtype)
    with use_backend("cpu"):
        all_heads = attention(q, k, v).unflatten(2, (6, 40))
        for h in range(6):
            assert torch.equal(all_heads[:, :, h], attention(*(t[:, :, h : h + 1] for t in (q, k, v))))

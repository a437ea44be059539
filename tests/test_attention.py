"""What attention promises beside its values: strides, masks as PyTorch means them, gradients, and any size of block."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import diffkern
from diffkern import attention, use_backend
from diffkern.available import availability
from diffkern.testing import check, make

BACKENDS = [b for b in ("cpu", "triton", "torch", "reference") if availability(b) is None]
KERNELS = [b for b in BACKENDS if b in ("cpu", "triton")]  # those that are diffkern's own


def qkv(batch=2, queries=7, keys=9, heads=3, dim=8, dtype=torch.float32):
    shapes = ((batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    return tuple(make(shape, "cpu", dtype, seed=s) for s, shape in enumerate(shapes))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_nothing(backend, dtype):
    """Heads or tokens outside, a slice of a longer sequence, and numbers that are not neighbours."""
    plain = qkv(dtype=dtype)
    ways = {
        "heads outside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens outside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "a slice": lambda t: F.pad(t, (3, 5, 0, 1, 2, 2))[:, 2:-2, :-1, 3:-5],
        "numbers apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "one head for all": lambda t: t[:, :, :1].expand(-1, -1, 3, -1),
    }
    with use_backend(backend):
        for name, way in ways.items():
            dense = tuple(t[:, :, :1].repeat(1, 1, 3, 1) for t in plain) if name == "one head for all" else plain
            assert torch.equal(attention(*map(way, plain)), attention(*dense)), name


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_query_that_attends_to_nothing_gets_zeros(backend):
    q, k, v = qkv()
    allowed = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[1, :, 3] = False
    added = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    heads_outside = (t.transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_outside, attn_mask=allowed).transpose(1, 2)  # type: ignore[misc]
    with use_backend(backend):
        for mask in (allowed, added, allowed.expand(-1, 3, -1, -1).contiguous()):
            out = attention(q, k, v, mask=mask)
            torch.testing.assert_close(out, expected.flatten(2))
            assert (out[1, 3] == 0).all()
        assert (attention(q, k[:, :0], v[:, :0]) == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_strides_of_a_mask_change_nothing(backend, dtype):
    q, k, v = qkv(2, 37, 19, 3, 8, torch.bfloat16)
    whole = make((2, 3, 37, 19), "cpu", torch.bfloat16, seed=3)
    whole = whole > 0 if dtype == torch.bool else whole
    ways = {
        "keys outside": lambda m: m.mT.contiguous().mT,
        "heads outside": lambda m: m.transpose(0, 1).contiguous().transpose(0, 1),
        "a slice": lambda m: F.pad(m, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
        "every second": lambda m: m.repeat_interleave(2, -1)[..., ::2],
        "one sample for all": lambda m: m[:1],
        "one head for all": lambda m: m[:, :1],
        "one query for all": lambda m: m[:, :, :1],
        "one key for all": lambda m: m[..., :1],
        "queries and keys": lambda m: m[0, 0],
    }
    with use_backend(backend):
        for name, way in ways.items():
            few = way(whole)
            assert torch.equal(attention(q, k, v, None, few), attention(q, k, v, None, few.expand_as(whole).clone())), (
                name
            )


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dim", [8, 512])
def test_a_key_that_is_masked_out_may_be_anything(backend, value, dim):
    """PyTorch's own adds -inf to the score, NaN or not: so this also says that a forced kernel is what runs."""
    q, k, v = qkv(dim=dim)
    keep = torch.arange(9) != 4
    expected = attention.reference(q, k, v, mask=keep)
    k[:, 4] = value
    with use_backend(backend):
        torch.testing.assert_close(attention(q, k, v, mask=keep), expected)


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
def test_wide_heads_in_float32_are_left_to_pytorch():
    float32, bfloat16 = torch.float32, torch.bfloat16
    for dim, queries, dtype, best in (
        (512, 17, float32, "torch"), (512, 17, bfloat16, "cpu"),
        (256, 17, float32, "cpu"), (256, 16, float32, "torch"), (128, 16, float32, "cpu"),
    ):  # fmt: skip
        said = diffkern.explain(attention, *qkv(queries=queries, dim=dim, dtype=dtype))
        assert [c.backend for c in said if c.chosen] == [best]
    with use_backend("cpu"):
        assert diffkern.explain(attention, *qkv(dim=512))[0] == ("cpu", True, "forced")


def test_gradients_equal_finite_differences_in_every_input():
    q, k, v = (t.double().requires_grad_() for t in qkv(1, 3, 4, 2, 3))
    mask = make((1, 2, 3, 4), "cpu", torch.float64, seed=3)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v), (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, 0.7, mask), (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask=mask > 0), (q, k, v))


def test_gradients_are_the_references():
    def gradients(function):
        inputs = [t.requires_grad_() for t in qkv()]
        (function(*inputs, None, None) * make((2, 7, 24), "cpu", torch.float32, seed=5)).sum().backward()
        return [t.grad for t in inputs]

    for got, expected in zip(gradients(attention), gradients(attention.reference), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
@pytest.mark.parametrize("queries", [1, 15, 16, 17, 33, 48, 64, 65, 130])
@pytest.mark.parametrize("keys", [1, 64, 65, 77, 129, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_every_size(queries, keys, dtype):
    """Vectors of queries that are full or not, one block of keys or several, and a last key that has no second one."""
    check(diffkern.op.OPS["attention"], "cpu", (*qkv(3, queries, keys, 5, 24, dtype), None, None))


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
@pytest.mark.parametrize(
    ("dtype", "around"),  # the limit: of 528 words a key, or of 272 where two numbers are a word
    [(torch.float32, (490, 510)), (torch.bfloat16, (490, 510)), (torch.bfloat16, (961, 965))],
)
def test_keys_that_are_not_held_in_the_cache_at_once(dtype, around):
    """Many and wide keys are gathered a block at a time, few ones once for all queries of a head."""
    for keys in around:
        check(diffkern.op.OPS["attention"], "cpu", (*qkv(1, 70, keys, 1, 512, dtype), None, None))


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
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
        check(diffkern.op.OPS["attention"], "cpu", (one, k, v, 1.0, None))


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_any_sign(scale, dtype):
    """The highest score is looked for before it is scaled; two blocks of keys, and one that is alone in its word."""
    q, k, v = qkv(2, 70, 129, 3, 24, dtype)
    mask = make((2, 3, 70, 129), "cpu", dtype, seed=3)
    for given in (None, mask, mask > 0):
        check(diffkern.op.OPS["attention"], "cpu", (q, k, v, scale, given))


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_near_the_ends_of_float32(dtype):
    """Only differences of scores are scaled: these may be as large as float32 goes, and so may a mask that is added."""
    q, k, v = qkv(1, 20, 130, 2, 8, dtype)
    lowest = torch.full((20, 130), torch.finfo(dtype).min).to(dtype)
    one = torch.arange(130) == torch.arange(20)[:, None] * 6
    key = torch.nn.functional.one_hot(torch.arange(20) * 6, 130).to(dtype)
    with use_backend("cpu"):
        even = attention(q, k, v, mask=lowest)  # every score is lost in the mask: all keys weigh the same
        picked = attention(q, k, v, mask=lowest.masked_fill(one, 0))
        q[:], k[:] = 1, -1
        k[:, 100], q[..., 1:], k[..., 1:] = 1, 0, 0
        far = attention(q * 3e18, k * 1e20, v, 1.0)
    exact = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[
        dtype
    ]  # the last place of a result, and of a mean of 130 values
    torch.testing.assert_close(
        even.unflatten(2, (2, 8)), v.mean(1, keepdim=True).expand(-1, 20, -1, -1), rtol=0, atol=exact
    )
    assert torch.equal(picked, torch.einsum("st,bthd->bshd", key, v).flatten(2))
    assert torch.equal(far, v[:, 100:101].expand(-1, 20, -1, -1).flatten(2))


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_that_are_subnormal(dtype):
    """The instruction that rounds to bfloat16 would take them for zero."""
    q, k, v = torch.zeros(3, 1, 4, 2, 40, dtype=dtype)
    v[:, 1, :, ::3] = -torch.finfo(dtype).smallest_normal
    with use_backend("cpu"):
        out = attention(q, k, v)
    assert torch.equal(out, (v[:, 1:2] / 4).expand(-1, 4, -1, -1).flatten(2))
    assert out.count_nonzero() == 4 * 2 * 14


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
@pytest.mark.parametrize("keys", [77, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_in_turn_or_one_after_the_other(keys, dtype):
    """Few keys of all heads are held at once, many of one head: a head alone has the same bits."""
    q, k, v = qkv(2, 130, keys, 6, 40, dtype)
    with use_backend("cpu"):
        all_heads = attention(q, k, v).unflatten(2, (6, 40))
        for h in range(6):
            assert torch.equal(all_heads[:, :, h], attention(*(t[:, :, h : h + 1] for t in (q, k, v))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_head(which, value, dtype):
    # bfloat16 rounds to 2^-8: the results, and maybe the weights of values that lie about 1 from their mean.
    rtol, atol = (2**-7, 2**-8) if dtype == torch.bfloat16 else (1.3e-6, 1e-5)
    inputs = qkv(dtype=dtype)
    inputs[which][1, 2, 1, 0] = value
    expected = attention.reference(*inputs)
    for backend in (*KERNELS, "reference"):  # PyTorch's own makes zeros of a query of NaN
        with use_backend(backend):
            out = attention(*inputs)
        torch.testing.assert_close(out, expected, rtol=rtol, atol=atol, equal_nan=True)
        assert out[0].isfinite().all()
        assert out[1, :, :8].isfinite().all()


@pytest.mark.device
@pytest.mark.skipif(availability("triton") is not None, reason="needs Triton")
@pytest.mark.parametrize(
    "shape",  # queries, keys, parts, blocks of queries: several blocks of keys, one, and keys that stay
    [(64, 32, 1, 0), (16, 32, 1, 0), (128, 128, 1, 0), (64, 32, 2, 0), (16, 128, 1, 2), (32, 128, 1, 8)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_launch_shapes_of_large_gpus(shape, dtype, monkeypatch):
    """Every way that the Triton kernels cut the work, chosen by a table or not, on this machine."""
    from diffkern.kernels import configs

    asked = []

    def choose(kernel, key):
        asked.append(key)
        return dict(zip(("QUERIES", "KEYS", "PARTS", "BLOCKS"), shape, strict=True)) | {"num_warps": 8, "num_stages": 2}

    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    op = diffkern.op.OPS["attention"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with configs.trying(choose):
        for sample in op.make_samples(device, dtype):
            args = sample.args()
            dim, keys = args[0].shape[-1], args[1].shape[1]
            fits = (not shape[3] or keys <= shape[1]) and (shape[2] == 1 or dim > 16)
            if not sample.workload and dim <= 160 and fits:
                check(op, "triton", args)
        for scale in (-0.7, 0.0):
            mask = make((2, 1, 21, 39), device, dtype, seed=3) > 0
            for given in (None, mask):
                check(op, "triton", (*(t.to(device) for t in qkv(2, 21, 39, 2, 24, dtype)), scale, given))
    assert "bytes 2, dim 80, queries 128, keys 128, masked 1" in asked


@pytest.mark.device
@pytest.mark.skipif(availability("triton") is not None, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("scores", "weights", "widest"),  # at once: blocks that end unevenly, and rows in one block or in six
    [(1 << 22, 1 << 25, 1 << 14), (4 * 88, 11 * 88, 1 << 14), (1, 1, 64)],
)
def test_products_of_a_library_in_blocks(scores, weights, widest, dtype, monkeypatch):
    """Several samples and heads out of packed tensors, cut in every way; a sample alone is the same bits."""
    from diffkern.kernels import attention_products, configs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in (("_SCORES", scores), ("_WEIGHTS", weights), ("_WIDEST", widest)):
        monkeypatch.setattr(attention_products, name, value)
    run = Mock(wraps=attention_products.attention_by_products)
    monkeypatch.setattr("diffkern.kernels.attention.attention_by_products", run)
    q = make((2, 13, 2, 24), device, dtype) * 3
    k, v = make((2, 88, 2, 2, 24), device, dtype, seed=1).unbind(2)
    with configs.trying(lambda kernel, key: {}):
        for scale in (None, -0.7, 0.0):
            check(diffkern.op.OPS["attention"], "triton", (q, k, v, scale, None))
        q[0, 3, 1, 2] = torch.nan
        with use_backend("triton"):
            out = attention(q, k, v)
            expected = attention.reference(q, k, v)
            assert torch.equal(out.isnan(), expected.isnan())
            with diffkern.batch_invariant():
                assert torch.equal(attention(q, k, v)[1:], attention(q[1:], k[1:], v[1:]))
    assert run.call_count >= 6

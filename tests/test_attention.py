"""What attention promises beside its values: strides, masks as PyTorch means them, and gradients."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

import diffkern
from diffkern import attention, use_backend
from diffkern.available import availability
from diffkern.testing import make

BACKENDS = [b for b in ("cpu", "triton", "torch", "reference") if availability(b) is None]
KERNELS = [b for b in BACKENDS if b in ("cpu", "triton")]  # those that are diffkern's own
module = importlib.import_module("diffkern.ops.attention")  # as an attribute it is the op


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
def test_wide_heads_in_float32_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(module, "vectors", lambda: "AVX512")
    float32, bfloat16 = torch.float32, torch.bfloat16
    for dim, queries, dtype, best in (
        (512, 17, float32, "torch"), (512, 17, bfloat16, "cpu"),
        (256, 17, float32, "cpu"), (256, 16, float32, "torch"), (128, 16, float32, "cpu"),
    ):  # fmt: skip
        said = diffkern.explain(attention, *qkv(queries=queries, dim=dim, dtype=dtype))
        assert [c.backend for c in said if c.chosen] == [best]
    with use_backend("cpu"):
        assert diffkern.explain(attention, *qkv(dim=512))[0] == ("cpu", True, "forced")


@pytest.mark.skipif(availability("cpu") is not None, reason="needs the native library")
def test_with_avx2_alone_many_keys_of_wide_heads_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(module, "vectors", lambda: "AVX2")
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    for dim, keys, dtype, best in (
        (256, 512, float32, "cpu"), (256, 513, float32, "torch"), (256, 513, bfloat16, "torch"),
        (256, 513, float16, "cpu"), (128, 1025, float32, "cpu"),
    ):  # fmt: skip
        said = diffkern.explain(attention, *qkv(batch=1, queries=17, keys=keys, heads=1, dim=dim, dtype=dtype))
        assert [c.backend for c in said if c.chosen] == [best]


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

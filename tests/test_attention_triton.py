"""Attention in Triton: every way to cut the work that a table may choose. On a GPU, else in the interpreter."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from test_attention import qkv

import diffkern
from diffkern import attention, use_backend
from diffkern.available import availability
from diffkern.op import OPS
from diffkern.testing import check, make

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(availability("triton") is not None, reason="needs Triton"),
]


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
    op = OPS["attention"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with configs.trying(choose):
        for sample in (s for s in op.make_samples(device, dtype) if not s.workload):
            args = sample.args()
            dim, keys = args[0].shape[-1], args[1].shape[1]
            fits = (not shape[3] or keys <= shape[1]) and (shape[2] == 1 or dim > 16)
            if dim <= 160 and fits:
                check(op, "triton", args)
        for scale in (-0.7, 0.0):
            mask = make((2, 1, 21, 39), device, dtype, seed=3) > 0
            for given in (None, mask):
                check(op, "triton", (*(t.to(device) for t in qkv(2, 21, 39, 2, 24, dtype)), scale, given))
    assert "bytes 2, dim 80, queries 128, keys 128, masked 1" in asked


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
            check(OPS["attention"], "triton", (q, k, v, scale, None))
        q[0, 3, 1, 2] = torch.nan
        with use_backend("triton"):
            out = attention(q, k, v)
            expected = attention.reference(q, k, v)
            assert torch.equal(out.isnan(), expected.isnan())
            with diffkern.batch_invariant():
                assert torch.equal(attention(q, k, v)[1:], attention(q[1:], k[1:], v[1:]))
    assert run.call_count >= 6

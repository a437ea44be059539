"""Batch invariance: under `batch_invariant()` a sample alone equals the sample in a batch, bit for bit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_sample import alone, calls
from torch import nn

import diffkern
from diffkern import invariant
from diffkern.models.dit import DiT, DiTConfig
from diffkern.models.unet import UNet2D, UNet2DConfig
from diffkern.op import OPS
from diffkern.schedules import cosine
from diffkern.testing import tensors

PRODUCTS = ("linear", "query_key_value", "conv2d", "attention")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_ops_give_a_sample_alone_what_they_give_it_in_a_batch(name, backend, dtype):
    op = OPS[name]
    for sample, args, batch in calls(op, dtype, workloads=False):
        with diffkern.use_backend(backend):
            plain = op(*args)
            with diffkern.batch_invariant():
                together = op(*args)
                singles = [tensors(op(*alone(op, args, i)))[0] for i in range(batch)]
        assert (together.shape, together.stride()) == (plain.shape, plain.stride()), sample
        assert torch.equal(together, torch.cat(singles)), sample
        if plain.numel():  # another order of the sums, whose terms may be larger than what is left of them
            scale = max(plain.abs().max().item(), args[0].abs().max().item())
            assert (together - plain).abs().max() <= 32 * torch.finfo(dtype).eps * scale, sample


def unet():
    return UNet2D(
        UNet2DConfig(
            sample_size=8, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, num_class_embeds=4,
        )
    )  # fmt: skip


def dit():
    return DiT(DiTConfig(num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8, patch_size=2,
                         num_embeds_ada_norm=3))  # fmt: skip


@pytest.mark.parametrize("make", [unet, dit])
def test_a_picture_has_the_same_bits_in_any_batch(make):
    torch.manual_seed(0)
    model = make().eval()
    table = diffkern.make_table("dpmpp_2m", cosine(1000, prediction="v"), 3)
    options: dict[str, Any] = {"labels": [0, 1, 2, 0, 1, 2, 0], "guidance": 2.0, "null_label": 3, "seed": 4}
    with diffkern.batch_invariant():
        together = diffkern.sample(model, table, 7, **options)
        for batch_size in (1, 3):
            assert torch.equal(diffkern.sample(model, table, 7, batch_size=batch_size, **options), together)
    assert together.std() > 0.1


@torch.no_grad()
def test_any_model_gives_a_sample_the_same_bits_in_any_batch():
    """Layers of PyTorch, sizes at which its kernels are known to choose by the size of the batch."""
    torch.manual_seed(0)
    layers: list[tuple[nn.Module, torch.Tensor]] = [
        (nn.Linear(1100, 70), torch.randn(21, 1100)),
        (nn.Linear(320, 200, bias=False), torch.randn(5, 3, 320)),
        (nn.Conv2d(24, 40, 3, padding=1), torch.randn(5, 24, 9, 9)),
        (nn.Conv1d(24, 40, 3), torch.randn(5, 24, 9)),
        (nn.Conv3d(4, 8, 3), torch.randn(3, 4, 5, 5, 5)),
    ]
    for layer, x in layers:
        with diffkern.batch_invariant():
            together = layer(x)
            for i in range(len(x)):
                assert torch.equal(layer(x[i : i + 1]), together[i : i + 1]), layer
                assert torch.equal(layer(x[i:]), together[i:]), layer
        torch.testing.assert_close(together, layer(x), msg=str(layer))


@pytest.mark.parametrize("mask", [None, (7, 9), (1, 2, 7, 9), (4, 1, 7, 9), (4, 9), (2, 1, 9)])
def test_attention_of_pytorch_takes_every_mask(mask):
    q, k, v = (torch.randn(4, 2, n, 16) for n in (7, 9, 9))
    added = None if mask is None else torch.randn(mask if mask != (4, 9) else (7, 9))
    expected = F.scaled_dot_product_attention(q, k, v, added)
    with diffkern.batch_invariant():
        together = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        for i in range(4):
            own = added[i : i + 1] if added is not None and mask == (4, 1, 7, 9) else added
            one = F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], own)
            assert torch.equal(one, together[i : i + 1])
    torch.testing.assert_close(together, expected)


def test_gradients_are_those_outside():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 4, 6)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    with diffkern.batch_invariant():
        assert torch.equal(torch.autograd.grad(layer(x).square().sum(), layer.weight)[0], expected)
        assert torch.autograd.grad(diffkern.linear(x, layer.weight).sum(), layer.weight)[0].shape == (5, 6)


def test_it_ends_with_its_block():
    with diffkern.batch_invariant():
        assert invariant.is_on()
    assert not invariant.is_on()
    with contextlib.suppress(KeyError), diffkern.batch_invariant():
        raise KeyError
    assert not invariant.is_on()


def test_samples_that_have_no_batch_axis_pass():
    with torch.no_grad():
        linear, conv = nn.Linear(3, 2), nn.Conv2d(3, 2, 3)
        x, picture = torch.randn(3), torch.randn(3, 5, 5)
        expected = linear(x), conv(picture), linear(x[None][:0])
        with diffkern.batch_invariant():
            got = linear(x), conv(picture), linear(x[None][:0])
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)

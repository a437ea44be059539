"""What networks are told, computed for all blocks in one product, is what each block's own layer makes of it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from diffkern import packing
from diffkern.available import availability
from diffkern.models.dit import SINUSOIDS, DiT, DiTConfig
from diffkern.models.unet import UNet2D, UNet2DConfig
from diffkern.ops.timestep_embedding import timestep_embedding

pytestmark = pytest.mark.skipif(availability("cpu") is not None, reason="keeps copies for the cpu backend")

EMBEDDING = torch.linspace(-3, 3, 3 * 32).view(3, 32)


def network(norm: str = "default") -> UNet2D:
    torch.manual_seed(0)
    return UNet2D(
        UNet2DConfig(
            sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, resnet_time_scale_shift=norm,
        )
    ).eval()  # fmt: skip


def blocks(model: UNet2D) -> list[Any]:
    return [block for level in model.levels() for block in level.resnets]


def one_by_one(model: UNet2D) -> Tensor:
    """What a block's convolution and its own layer of the time embedding add to its pixels, or scale and shift by."""
    rows = []
    for block in blocks(model):
        row = block.time_emb_proj(F.silu(EMBEDDING))
        rows.append(row if block.scale_shift else row + block.conv1.bias)
    return torch.cat(rows, dim=1)


def equal(model: UNet2D) -> bool:
    with torch.no_grad():
        return torch.allclose(model.rows(EMBEDDING), one_by_one(model), rtol=1e-6, atol=1e-5)  # float32 sums of 32


def scale(layer: nn.Linear) -> None:
    layer.weight.mul_(0.5)


def merge(layer: nn.Linear) -> None:
    """As peft merges a LoRA: PyTorch counts no change of what is reached through `.data`."""
    layer.weight.data += torch.randn(len(layer.weight), 2) @ torch.randn(2, 32)


def assign(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def shift(layer: nn.Linear) -> None:
    layer.bias.add_(1)


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
@pytest.mark.parametrize("change", [scale, merge, assign, shift], ids=lambda f: f.__name__)
def test_a_change_of_any_block_shows_in_the_next_call(change: Callable[[nn.Linear], None], norm: str):
    model = network(norm)
    for block in blocks(model):
        assert equal(model)
        with torch.no_grad():
            before = model.rows(EMBEDDING)
            change(block.time_emb_proj)
            assert not torch.equal(model.rows(EMBEDDING), before)
        assert equal(model)


def test_a_copy_of_the_network_is_told_by_its_own_weights():
    model = network()
    assert equal(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        blocks(other)[0].time_emb_proj.weight.add_(1)
    assert equal(other)
    assert equal(model)


def test_one_copy_of_the_weights_is_kept_and_goes_with_the_network():
    gc.collect()
    before, model = packing.kept_bytes(), network()
    for _ in range(2):
        assert equal(model)
        assert packing.kept_bytes() == before + 4 * 32 * sum(model.time_widths)
    del model
    gc.collect()
    assert packing.kept_bytes() == before


def test_gradients_reach_every_block():
    model = network()
    assert equal(model)  # there is a copy that autograd would not see through
    model.rows(EMBEDDING).square().sum().backward()
    found = [block.time_emb_proj.weight.grad for block in blocks(model)]
    model.zero_grad(set_to_none=True)
    one_by_one(model).square().sum().backward()
    for grad, block in zip(found, blocks(model), strict=True):
        torch.testing.assert_close(grad, block.time_emb_proj.weight.grad)


def test_a_picture_is_told_the_same_in_any_batch():
    model = network()
    with torch.no_grad():
        together = model.rows(EMBEDDING)
        for i in range(3):
            assert torch.allclose(model.rows(EMBEDDING[i : i + 1])[0], together[i], rtol=0, atol=1e-6)


def test_weights_without_memory_and_of_several_networks_at_once_have_no_copy():
    model = network()
    before = packing.kept_bytes()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert model.rows(mode.from_tensor(EMBEDDING)).shape == (3, sum(model.time_widths))
    weight = blocks(model)[0].time_emb_proj.weight

    def told(changed: Tensor) -> Tensor:
        name = "down_blocks.0.resnets.0.time_emb_proj.weight"
        return torch.func.functional_call(Rows(model), {f"model.{name}": changed}, (EMBEDDING,))

    with torch.no_grad():
        once, twice = torch.func.vmap(told)(torch.stack([weight, 2 * weight]))
        assert packing.kept_bytes() == before
        torch.testing.assert_close(once, model.rows(EMBEDDING))
        weight.mul_(2)
        torch.testing.assert_close(twice, model.rows(EMBEDDING))


def test_a_change_of_any_block_of_a_dit_shows_in_the_next_call():
    torch.manual_seed(0)
    model = DiT(DiTConfig(num_attention_heads=2, attention_head_dim=8, num_layers=3, num_embeds_ada_norm=10)).eval()
    norms: list[Any] = [block.norm1 for block in model.transformer_blocks]
    t, labels = torch.tensor([3.0, 900.0]), torch.tensor([1, 10])

    def equal() -> bool:
        sinusoids, rows = timestep_embedding(t, SINUSOIDS, freq_shift=1.0), []
        for norm in norms:
            vector = F.silu(norm.emb.timestep_embedder(sinusoids) + norm.emb.class_embedder.embedding_table(labels))
            rows.append(norm.linear(vector).unflatten(1, (6, 16)).transpose(0, 1))
        return torch.allclose(model.conditioning(t, labels)[:18], torch.cat(rows), rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        for norm in norms:
            assert equal()
            before = model.conditioning(t, labels)
            norm.emb.timestep_embedder.linear_1.weight.data += 0.5
            assert not torch.equal(model.conditioning(t, labels), before)
        assert equal()


class Rows(nn.Module):
    def __init__(self, model: UNet2D) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedding: Tensor) -> Tensor:
        return self.model.rows(embedding)

"""Weights that lie side by side are one weight without a copy, and stay what they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffkern
from diffkern.backend import use_backend
from diffkern.layout import joined, lay_side_by_side
from diffkern.testing import make


def layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, 6) for _ in range(3)]


@torch.no_grad()
def is_view(parts: list[torch.Tensor]) -> bool:
    whole = joined(parts)
    assert torch.equal(whole, torch.cat(parts))
    return whole.data_ptr() == parts[0].data_ptr()


def test_parts_are_joined_without_a_copy_only_where_they_lie_side_by_side():
    weights = [layer.weight for layer in layers()]
    before = [w.clone() for w in weights]
    assert not is_view(weights)
    lay_side_by_side(weights)
    assert is_view(weights)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert not is_view(weights[::-1])
    assert not is_view([weights[0], weights[0], weights[1]])
    assert not is_view([w.detach()[:, ::2] for w in weights])
    weights[2].data = weights[2].data.clone()
    assert not is_view(weights)


def test_gradients_reach_each_of_those_that_lie_side_by_side():
    weights = [layer.weight for layer in layers()]
    lay_side_by_side(weights)
    joined(weights).square().sum().backward()
    for w in weights:
        assert w.grad is not None
        assert torch.equal(w.grad, 2 * w)


@pytest.mark.parametrize("bias", [True, False])
def test_a_change_of_one_shows_in_the_product(bias):
    each = layers()
    x = make((2, 5, 8), "cpu", torch.float32)

    def product() -> torch.Tensor:
        weights, biases = [m.weight for m in each], [m.bias if bias else None for m in each]
        with torch.no_grad(), use_backend("torch"):
            got = diffkern.query_key_value(x, *weights, *biases)
        expected = torch.stack([nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -2)
        assert torch.allclose(got, expected, atol=1e-6)
        return got

    lay_side_by_side([m.weight for m in each])
    lay_side_by_side([m.bias for m in each])
    before = product()
    each[1].weight.data += 1  # which PyTorch counts no change of
    assert (product() != before).any()
    each[2].load_state_dict(nn.Linear(8, 6).state_dict())
    product()
    each = copy.deepcopy(each)
    product()
    each[0].weight = nn.Parameter(torch.randn(6, 8))
    product()

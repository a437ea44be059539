"""Which LayerNorm the transformer blocks of a UNet take: the op's on a GPU, PyTorch's on a CPU. No GPU is needed: the
tensors have no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffkern
from diffkern.integrations.modules import transformer
from diffkern.models.blocks import Context
from diffkern.models.transformer import TransformerBlock


class Seen(TorchDispatchMode):
    """The norms that the dispatcher was asked for, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "layer_norm" in str(func):
            self.norms.append((str(func).split(".")[1], args))
        return func(*args, **(kwargs or {}))


KINDS = pytest.mark.parametrize(
    ("device", "name", "given"),
    [("cuda", "layer_norm_modulate", slice(3, 6)), ("cpu", "native_layer_norm", slice(2, 5))],
)


@KINDS
def test_norms_of_a_block(device, name, given):
    with FakeTensorMode(), torch.no_grad():
        block = TransformerBlock(16, 2, 24)
        keys = torch.empty(2, 3, 2, 8, device=device)
        check_norms(block, device, name, given, Context(keys, keys))


@KINDS
def test_norms_of_a_block_of_diffusers(device, name, given, monkeypatch):
    attention = pytest.importorskip("diffusers.models.attention")
    monkeypatch.setattr(transformer, "takes", lambda weight, x: True)  # a parameter without numbers is of another type
    with FakeTensorMode(), torch.no_grad():
        block = attention.BasicTransformerBlock(16, 2, 8, cross_attention_dim=24)
        diffkern.accelerate(block)
        check_norms(block, device, name, given, None, torch.empty(2, 3, 24, device=device))


def check_norms(block: Any, device: str, name: str, given: slice, *told: Any) -> None:
    for module in block.modules():
        for key, p in module.named_parameters(recurse=False):
            setattr(module, key, torch.nn.Parameter(torch.empty(p.shape, device=device)))
    norms = [block.norm1, block.norm2, block.norm3]
    for i, norm in enumerate(norms):
        norm.eps = 1e-3 * (i + 1)
    with Seen() as seen:
        block(torch.empty(2, 5, 16, device=device), *told)
    assert [found for found, _ in seen.norms] == [name] * 3
    for norm, (_, args) in zip(norms, seen.norms, strict=True):
        weight, bias, eps = args[given]
        assert weight is norm.weight
        assert bias is norm.bias
        assert eps == norm.eps

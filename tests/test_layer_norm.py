"""Which LayerNorm the transformer blocks of a UNet take: the op's on a GPU, PyTorch's on a CPU. No GPU is needed: the
tensors have no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize(
    ("device", "name", "given"),
    [("cuda", "layer_norm_modulate", slice(3, 6)), ("cpu", "native_layer_norm", slice(2, 5))],
)
def test_norms_of_a_block(device, name, given):
    with FakeTensorMode(), torch.no_grad():
        block = TransformerBlock(16, 2, 24)
        for module in block.modules():
            for key, p in module.named_parameters(recurse=False):
                setattr(module, key, torch.nn.Parameter(torch.empty(p.shape, device=device)))
        norms = [block.norm1, block.norm2, block.norm3]
        for i, norm in enumerate(norms):
            norm.eps = 1e-3 * (i + 1)
        x, keys = torch.empty(2, 5, 16, device=device), torch.empty(2, 3, 2, 8, device=device)
        with Seen() as seen:
            block(x, Context(keys, keys))
    assert [found for found, _ in seen.norms] == [name] * 3
    for norm, (_, args) in zip(norms, seen.norms, strict=True):
        weight, bias, eps = args[given]
        assert weight is norm.weight
        assert bias is norm.bias
        assert eps == norm.eps

"""What `accelerate` replaces in the transformers of diffusers_models.py, and each of them plain and accelerated."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers_models import accelerated, make

# By model: how many of which classes run in ops, beside linear layers and the like.
COUNTS = {
    "SD 3": {"JointTransformerBlock": 3, "Attention": 3, "AdaLayerNormZero": 5, "AdaLayerNormContinuous": 2},
    "SD 3.5": {"JointTransformerBlock": 3, "Attention": 5, "SD35AdaLayerNormZeroX": 2, "RMSNorm": 16},
    "ControlNet of SD 3.5, without a prompt": {"SD3SingleTransformerBlock": 3, "Attention": 3},
    "Flux": {
        "FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2, "FluxAttention": 4, "AdaLayerNormZeroSingle": 2,
        "AdaLayerNormContinuous": 1, "FeedForward": 4,
    },
    "Wan": {"WanTransformerBlock": 2, "WanAttention": 4, "FeedForward": 2, "RMSNorm": 8},
    "LTX": {"LTXVideoTransformerBlock": 2, "LTXAttention": 4, "FeedForward": 2, "RMSNorm": 12},
    "PixArt": {"BasicTransformerBlock": 2, "Attention": 4, "FeedForward": 2},
    "DiT": {"BasicTransformerBlock": 2, "Attention": 2, "AdaLayerNormZero": 2, "FeedForward": 2},
}  # fmt: skip


def both(name: str) -> tuple[Any, Any]:
    return make(name), accelerated(name)


def called_as_they_are(model: Any, names: set[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the class of each accelerated module that is run by its own forward."""
    seen: list[str] = []
    for cls in {type(m).plain for m in model.modules() if type(m).__name__ in names}:

        def forward(self: Any, *args: Any, cls: Any = cls, own: Any = cls.forward, **kwargs: Any) -> Any:
            seen.append(cls.__name__)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    return seen

"""The modules that work on tokens one by one: linear layers, feed-forward networks, RMSNorm and sinusoids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.modules.base import Accelerated, gated, is_part, is_silent, project, takes
from diffkern.ops.linear import linear
from diffkern.ops.rms_norm import rms_norm
from diffkern.ops.timestep_embedding import timestep_embedding

# So few rows, as of the embedding of a timestep, take less time in PyTorch than the choice of a backend does.
FEW = 8


class Linear(Accelerated):
    replaces = ("torch.nn.Linear",)
    ops = ("linear",)

    def fused(self: Any, input: Tensor) -> Any:
        if input.dim() < 2 or input.shape[:-1].numel() <= FEW or not takes(self.weight, input):
            return NotImplemented
        return linear(input, self.weight, self.bias)


class GEGLU(Accelerated):
    replaces = ("diffusers.models.activations.GEGLU",)
    ops = ("linear",)
    activation = "geglu"

    def fused(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if args or kwargs else project(self.proj, hidden_states, self.activation)


class SwiGLU(GEGLU):
    replaces = ("diffusers.models.activations.SwiGLU",)
    activation = "swiglu"


class GELU(Accelerated):
    replaces = ("diffusers.models.activations.GELU",)
    ops = ("linear",)

    def fused(self: Any, hidden_states: Tensor) -> Any:
        return project(self.proj, hidden_states, "gelu_tanh" if self.approximate == "tanh" else "gelu")


class FeedForward(Accelerated):
    replaces = ("diffusers.models.attention.FeedForward",)
    ops = ("linear",)

    def fused(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if args or kwargs else _layers(self, hidden_states)


def _layers(module: Any, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Any:
    """A FeedForward layer by layer, * gate + residual; NotImplemented for other layers than it has by default."""
    if len(module.net) not in (3, 4):
        return NotImplemented
    first, middle, last, *dropout = module.net
    if not all(map(is_silent, (middle, *dropout))):
        return NotImplemented
    return project(last, first(x), residual=residual, gate=gate)


def feed_forward(module: Any, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """module(x) * gate + residual, in the epilogue of the last layer if it is a FeedForward. x: [B, T, C]. gate:
    [B, C]."""
    if is_part(module, FeedForward):
        result = _layers(module, x, residual, gate)
        if result is not NotImplemented:
            return result
    return gated(module(x), residual, gate)


class RMSNorm(Accelerated):
    replaces = ("diffusers.models.normalization.RMSNorm", "torch.nn.RMSNorm")
    ops = ("rms_norm",)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if getattr(module, "bias", None) is not None:
            return "it has a bias"
        if module.eps is None:
            return "its eps depends on the dtype"
        return None if len(getattr(module, "dim", None) or module.normalized_shape) == 1 else "it has several axes"

    def fused(self: Any, hidden_states: Tensor) -> Any:
        return rms_norm(hidden_states, self.weight, self.eps) if takes(self.weight, hidden_states) else NotImplemented


class Timesteps(Accelerated):
    replaces = ("diffusers.models.embeddings.Timesteps",)
    ops = ("timestep_embedding",)

    def fused(self: Any, timesteps: Tensor) -> Any:
        if timesteps.dim() != 1 or torch.is_grad_enabled():  # what trains is told the numbers of plain diffusers
            return NotImplemented
        scaled = timesteps if self.scale == 1 else timesteps.to(torch.float32) * self.scale
        return timestep_embedding(scaled, self.num_channels, self.flip_sin_to_cos, float(self.downscale_freq_shift))

"""The norms that a timestep or a prompt modulates, beside that of DiT in `transformer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.modules.base import Accelerated
from diffkern.integrations.modules.transformer import is_plain_layer_norm, norm_modulate


class AdaLayerNormZeroSingle(Accelerated):
    replaces = ("diffusers.models.normalization.AdaLayerNormZeroSingle",)
    ops = ("layer_norm_modulate",)

    def fused(self: Any, x: Tensor, emb: Tensor | None = None) -> Any:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return norm_modulate(self.norm, x, shift, scale), gate


class SD35AdaLayerNormZeroX(Accelerated):
    """Of one normalised x two modulations. That x is normalised twice costs less than to write it down in between."""

    replaces = ("diffusers.models.normalization.SD35AdaLayerNormZeroX",)
    ops = ("layer_norm_modulate",)

    def fused(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> Any:
        if not is_plain_layer_norm(self.norm, hidden_states):
            return NotImplemented
        shift, scale, gate, *rest, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        first, second = (norm_modulate(self.norm, hidden_states, *rows) for rows in ((shift, scale), (shift2, scale2)))
        return first, gate, *rest, second, gate2


class AdaLayerNormContinuous(Accelerated):
    replaces = ("diffusers.models.normalization.AdaLayerNormContinuous",)
    ops = ("layer_norm_modulate",)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return None if isinstance(module.norm, torch.nn.LayerNorm) else "its norm is not a LayerNorm"

    def fused(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Any:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return norm_modulate(self.norm, x, shift, scale)


class AdaLayerNorm(Accelerated):
    replaces = ("diffusers.models.normalization.AdaLayerNorm",)
    ops = ("layer_norm_modulate",)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return None if module.chunk_dim == 1 else "one scale and shift serve all samples"

    def fused(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Any:
        rows = self.linear(self.silu(temb if self.emb is None else self.emb(timestep)))
        shift, scale = rows.chunk(2, dim=1)
        return norm_modulate(self.norm, x, shift, scale)

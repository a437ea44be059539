"""The blocks of SD 3 (MMDiT, Esser et al. 2024): an image's tokens and a prompt's attend to both, and then go through
networks of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.modules.base import Accelerated
from diffkern.integrations.modules.tokens import feed_forward
from diffkern.integrations.modules.transformer import residual_norm

BLOCK = ("linear", "layer_norm_modulate", "gate_residual_norm_modulate")


def after_attention(
    norm: Any, network: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor
) -> Tensor:
    """The stream x: [B, T, C] with what its attention says, y, and then with what its feed-forward network says."""
    x, y = residual_norm(norm, x, y, gate, shift, scale)
    return feed_forward(network, y, residual=x, gate=gate2)


class JointTransformerBlock(Accelerated):
    replaces = ("diffusers.models.attention.JointTransformerBlock",)
    ops = BLOCK

    def fused(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._chunk_size is not None:
            return NotImplemented
        given = joint_attention_kwargs or {}
        x, context = hidden_states, encoder_hidden_states
        y, gate, shift, scale, gate2, *dual = self.norm1(x, emb=temb)
        if self.context_pre_only:
            c, rows = self.norm1_context(context, temb), []
        else:
            c, *rows = self.norm1_context(context, emb=temb)
        y, c = self.attn(hidden_states=y, encoder_hidden_states=c, **given)
        if dual:
            normal, other = dual
            x = torch.addcmul(x, y, gate[:, None])
            y, gate = self.attn2(hidden_states=normal, **given), other
        x = after_attention(self.norm2, self.ff, x, y, gate, shift, scale, gate2)
        if self.context_pre_only:
            return None, x
        return after_attention(self.norm2_context, self.ff_context, context, c, *rows), x


class SD3SingleTransformerBlock(Accelerated):
    replaces = ("diffusers.models.transformers.transformer_sd3.SD3SingleTransformerBlock",)
    ops = BLOCK

    def fused(self: Any, hidden_states: Tensor, temb: Tensor) -> Any:
        y, *rows = self.norm1(hidden_states, emb=temb)
        y = self.attn(hidden_states=y, encoder_hidden_states=None)
        return after_attention(self.norm2, self.ff, hidden_states, y, *rows)

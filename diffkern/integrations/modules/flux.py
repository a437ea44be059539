"""The attention and the blocks of FLUX (Black Forest Labs 2024): two streams of tokens first, then one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.integrations.modules.base import Accelerated, is_plain, project
from diffkern.integrations.modules.heads import IMAGE, PROMPT, attend_together, dispatch_reason, queries_keys_values
from diffkern.integrations.modules.joint import BLOCK, after_attention

IGNORED = {"ip_hidden_states", "ip_adapter_masks"}  # what blocks hand to all attentions when one has an IP-Adapter


class FluxAttention(Accelerated):
    replaces = ("diffusers.models.transformers.transformer_flux.FluxAttention",)
    ops = ("linear", "qk_norm_rope", "attention")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return dispatch_reason(module, "FluxAttnProcessor")

    def fused(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, context = hidden_states, encoder_hidden_states
        if kwargs.keys() - IGNORED or attention_mask is not None or self.why_not(self) is not None:
            return NotImplemented
        if (context is None) != (self.added_kv_proj_dim is None):
            return NotImplemented
        prompt = 0 if context is None else context.shape[1]
        first, second = None, None
        if image_rotary_emb is not None:
            shape = (prompt + x.shape[1], self.head_dim)
            if any(t.shape != shape or t.dtype != torch.float32 for t in image_rotary_emb):
                return NotImplemented
            cos, sin = image_rotary_emb
            first, second = (cos[:prompt], sin[:prompt]), (cos[prompt:], sin[prompt:])
        streams = [queries_keys_values(self, x, IMAGE, self.fused_projections, rotation=second)]
        if context is None:
            return attend_together(*streams)
        streams.insert(0, queries_keys_values(self, context, PROMPT, self.fused_projections, rotation=first))
        out = attend_together(*streams)
        y = self.to_out[1](project(self.to_out[0], out[:, prompt:]))
        return y, project(self.to_add_out, out[:, :prompt])


def clipped(x: Tensor) -> Tensor:
    """Within what float16 holds."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FluxTransformerBlock(Accelerated):
    replaces = ("diffusers.models.transformers.transformer_flux.FluxTransformerBlock",)
    ops = BLOCK

    def fused(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        x, context = hidden_states, encoder_hidden_states
        y, *rows = self.norm1(x, emb=temb)
        c, *context_rows = self.norm1_context(context, emb=temb)
        given = joint_attention_kwargs or {}
        y, c, *adapters = self.attn(
            hidden_states=y, encoder_hidden_states=c, image_rotary_emb=image_rotary_emb, **given
        )
        x = after_attention(self.norm2, self.ff, x, y, *rows)
        for picture in adapters:  # what an IP-Adapter's processor returns as a third
            x = x + picture
        return clipped(after_attention(self.norm2_context, self.ff_context, context, c, *context_rows)), x


class FluxSingleTransformerBlock(Accelerated):
    replaces = ("diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock",)
    ops = BLOCK[:2]

    def fused(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        prompt = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normal, gate = self.norm(x, emb=temb)
        if is_plain(self.act_mlp, nn.GELU) and self.act_mlp.approximate == "tanh":
            wide = project(self.proj_mlp, normal, "gelu_tanh")
        else:
            wide = self.act_mlp(self.proj_mlp(normal))
        y = self.attn(hidden_states=normal, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = clipped(project(self.proj_out, torch.cat([y, wide], dim=2), residual=x, gate=gate))
        return x[:, :prompt], x[:, prompt:]

"""The attention and the blocks of Wan (Wan Team 2025) and LTX-Video (HaCohen et al. 2024). Both normalise queries and
keys across all heads at once. Wan then rotates each head, LTX all of a token's numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.integrations.modules.attention import leave, mask_of, queries_keys_values
from diffkern.integrations.modules.base import Accelerated, gated, is_plain, project
from diffkern.integrations.modules.heads import dispatch_reason, norm_rotate
from diffkern.integrations.modules.tokens import feed_forward
from diffkern.ops.attention import attention
from diffkern.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from diffkern.ops.layer_norm_modulate import layer_norm_modulate
from diffkern.ops.qk_norm_rope import qk_norm_rope


class WanAttention(Accelerated):
    replaces = ("diffusers.models.transformers.transformer_wan.WanAttention",)
    ops = ("linear", "rms_norm", "qk_norm_rope", "attention")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        reason = dispatch_reason(module, "WanAttnProcessor")
        return "it attends to a picture as well" if reason is None and module.add_k_proj is not None else reason

    def fused(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: Any = None, *, residual: Tensor | None = None,
        gate: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """rotary_emb: cosines and sines [1, S, 1, D]. residual, gate: as in `attend`."""
        x, context = hidden_states, encoder_hidden_states
        if kwargs or attention_mask is not None or self.why_not(self) is not None:
            return NotImplemented
        if self.fused_projections and self.is_cross_attention != (context is not None):
            return NotImplemented
        if rotary_emb is not None and (context is not None or any(t.shape[:3:2] != (1, 1) for t in rotary_emb)):
            return NotImplemented
        q, k, v = queries_keys_values(self, x, context, self.fused_projections)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.norm_q(q), self.norm_k(k), v))
        if rotary_emb is not None:
            # Of each pair of numbers it takes the cosine at the first and the sine at the second.
            cos, sin = (t[0, :, 0, i::2].float().repeat_interleave(2, dim=-1) for i, t in enumerate(rotary_emb))
            q, k = qk_norm_rope(q, k, None, None, cos, sin)
        return leave(self, attention(q, k, v), residual, gate)


class LTXAttention(Accelerated):
    replaces = ("diffusers.models.transformers.transformer_ltx.LTXAttention",)
    ops = ("linear", "rms_norm", "qk_norm_rope", "attention")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if module.inner_kv_dim != module.inner_dim:
            return "several heads share keys and values"
        return dispatch_reason(module, "LTXVideoAttnProcessor")

    def fused(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Any = None, *, residual: Tensor | None = None,
        gate: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """image_rotary_emb: cosines and sines [B, S, C]. residual, gate: as in `attend`."""
        x, context = hidden_states, encoder_hidden_states
        if kwargs or self.why_not(self) is not None:
            return NotImplemented
        if image_rotary_emb is not None and (
            context is not None or any(t.shape != (*x.shape[:2], self.inner_dim) for t in image_rotary_emb)
        ):
            return NotImplemented
        other = x if context is None else context
        q, k, v = project(self.to_q, x), project(self.to_k, other), project(self.to_v, other)
        mask = mask_of(attention_mask, k)
        if mask is NotImplemented:
            return NotImplemented
        if image_rotary_emb is None:
            q, k = self.norm_q(q), self.norm_k(k)
        else:
            # Every sample has angles of its own: all tokens as those of one sample, with one wide head.
            q, k = (t.reshape(1, -1, 1, t.shape[-1]) for t in (q, k))
            cos, sin = (t.float().flatten(0, 1) for t in image_rotary_emb)
            q, k = (t.view(v.shape) for t in norm_rotate(self.norm_q, self.norm_k, q, k, (cos, sin)))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        return leave(self, attention(q, k, v, None, mask), residual, gate)


def attend(attn: Any, x: Tensor, *args: Any, residual: Tensor, gate: Tensor | None = None) -> Tensor:
    """attn(x, *args) * gate + residual, in the epilogue of the attention's last layer if it is one of those here.
    x: [B, S, C]. gate: [B, C]."""
    if isinstance(attn, (WanAttention, LTXAttention)) and is_plain(attn, attn.plain):
        result = attn.fused(x, *args, residual=residual, gate=gate)
        if result is not NotImplemented:
            return result
    return gated(attn(x, *args), residual, gate)


def is_float32_norm(norm: Any) -> bool:
    """Whether a norm is a LayerNorm that computes in float32, and no more."""
    cls = getattr(type(norm), "plain", type(norm))
    known = cls.__name__ == "FP32LayerNorm" and cls.__module__.startswith("diffusers.")
    return known and is_plain(norm, cls) and all(type(p) is nn.Parameter for p in norm.parameters())


class WanTransformerBlock(Accelerated):
    """Scales, shifts and the first gate are in float32, as in diffusers. The second gate is rounded to the dtype of
    the tokens, in place of what it multiplies."""

    replaces = ("diffusers.models.transformers.transformer_wan.WanTransformerBlock",)
    ops = ("linear", "layer_norm_modulate", "gate_residual_norm_modulate")

    def fused(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any = None
    ) -> Any:
        if temb.dim() != 3 or not (is_float32_norm(self.norm1) and is_float32_norm(self.norm3)):
            return NotImplemented
        x = hidden_states
        shift, scale, gate, shift2, scale2, gate2 = (self.scale_shift_table + temb.float()).unbind(1)
        y = layer_norm_modulate(x, shift, scale, None, None, self.norm1.eps)
        y = self.attn1(y, None, None, rotary_emb)
        if is_float32_norm(self.norm2):
            norm, zero = self.norm2, torch.zeros_like(gate)
            x, y = gate_residual_norm_modulate(x, y, gate, zero, zero, norm.weight, norm.bias, norm.eps)
        else:
            x = (x.float() + y * gate[:, None]).to(x.dtype)
            y = self.norm2(x.float()).to(x.dtype)
        x = attend(self.attn2, y, encoder_hidden_states, None, None, residual=x)
        y = layer_norm_modulate(x, shift2, scale2, None, None, self.norm3.eps)
        return feed_forward(self.ffn, y, residual=x, gate=gate2.to(x.dtype))


class LTXVideoTransformerBlock(Accelerated):
    replaces = ("diffusers.models.transformers.transformer_ltx.LTXVideoTransformerBlock",)
    ops = ("linear",)

    def fused(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Any:  # fmt: skip
        if temb.dim() != 3 or temb.shape[1] != 1:  # a timestep for each token
            return NotImplemented
        x = hidden_states
        rows = self.scale_shift_table + temb.reshape(len(x), *self.scale_shift_table.shape)
        shift, scale, gate, shift2, scale2, gate2 = rows.unbind(1)
        y = torch.addcmul(shift[:, None], self.norm1(x), 1 + scale[:, None])
        x = attend(self.attn1, y, None, None, image_rotary_emb, residual=x, gate=gate)
        x = attend(self.attn2, x, encoder_hidden_states, encoder_attention_mask, residual=x)
        y = torch.addcmul(shift2[:, None], self.norm2(x), 1 + scale2[:, None])
        return feed_forward(self.ff, y, residual=x, gate=gate2)

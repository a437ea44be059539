"""The transformer blocks of UNets, DiT and PixArt, and the way from pixels to tokens and back around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.integrations.modules.attention import attend
from diffkern.integrations.modules.base import (
    Accelerated,
    convolve,
    is_for_ops,
    is_for_training,
    is_plain,
    norm_silu,
    project,
    takes,
)
from diffkern.integrations.modules.tokens import feed_forward
from diffkern.models.blocks import pixels_of, tokens_of
from diffkern.models.transformer import layer_norm
from diffkern.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from diffkern.ops.layer_norm_modulate import layer_norm_modulate


def is_plain_layer_norm(norm: Any, x: Tensor) -> bool:
    """Whether a norm is a LayerNorm over the last axis of x, and no more."""
    return is_plain(norm, nn.LayerNorm) and takes(norm.weight, x) and len(norm.normalized_shape) == 1


def token_norm(norm: Any, x: Tensor) -> Tensor:
    """norm(x), by `layer_norm` if it is a plain LayerNorm."""
    return layer_norm(norm, x) if is_plain_layer_norm(norm, x) else norm(x)


def norm_modulate(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in one op if the norm is a plain LayerNorm. x: [B, T, C]. shift, scale: [B, C]."""
    if is_plain_layer_norm(norm, x):
        return layer_norm_modulate(x, shift, scale, norm.weight, norm.bias, norm.eps)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def residual_norm(norm: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """r = x + gate * y, and norm(r) * (1 + scale) + shift, in one op if the norm is a plain LayerNorm. x, y:
    [B, T, C]. gate, shift, scale: [B, C]."""
    if is_plain_layer_norm(norm, x):
        return gate_residual_norm_modulate(x, y, gate, shift, scale, norm.weight, norm.bias, norm.eps)
    x = x + gate[:, None] * y
    return x, norm_modulate(norm, x, shift, scale)


class AdaLayerNormZero(Accelerated):
    replaces = ("diffusers.models.normalization.AdaLayerNormZero",)
    ops = ("layer_norm_modulate",)

    def fused(
        self: Any,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> Any:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return norm_modulate(self.norm, x, shift, scale), *rest


class BasicTransformerBlock(Accelerated):
    replaces = ("diffusers.models.attention.BasicTransformerBlock",)
    ops = ("linear", "attention", "layer_norm_modulate", "gate_residual_norm_modulate")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if module.norm_type not in ("layer_norm", "ada_norm_zero", "ada_norm_single"):
            return f"its norm is {module.norm_type}"
        return None if module.pos_embed is None else "it adds the embedding of positions"

    def fused(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Any:
        if cross_attention_kwargs or hidden_states.dim() != 3 or self._chunk_size is not None:
            return NotImplemented
        x, own = hidden_states, encoder_hidden_states if self.only_cross_attention else None
        gate: Any = None
        shift2: Any = None
        scale2: Any = None
        gate2: Any = None
        if self.norm_type == "layer_norm":
            y = token_norm(self.norm1, x)
        elif self.norm_type == "ada_norm_zero":
            y, gate, shift2, scale2, gate2 = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        else:
            rows = self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
            shift, scale, gate, shift2, scale2, gate2 = rows.unbind(1)
            y = norm_modulate(self.norm1, x, shift, scale)
        norm = self.norm2 if self.norm_type == "ada_norm_single" else self.norm3
        if self.attn2 is None and gate is not None:
            y = self.attn1(y, encoder_hidden_states=own, attention_mask=attention_mask)
            x, y = residual_norm(norm, x, y, gate, shift2, scale2)
        else:
            x = attend(self.attn1, y, own, attention_mask, residual=x, gate=gate)
            if self.attn2 is not None:
                y = x if self.norm_type == "ada_norm_single" else token_norm(self.norm2, x)
                x = attend(self.attn2, y, encoder_hidden_states, encoder_attention_mask, residual=x)
            y = token_norm(norm, x) if shift2 is None else norm_modulate(norm, x, shift2, scale2)
        return feed_forward(self.ff, y, residual=x, gate=gate2)


class Transformer2DModel(Accelerated):
    """The pixels of a channels_last picture are tokens as they lie: nothing is copied on the way in or out."""

    replaces = ("diffusers.models.transformers.transformer_2d.Transformer2DModel",)
    ops = ("group_norm_silu", "conv2d", "linear")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return None if module.is_input_continuous else "its input is not pixels"

    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented  # its own forward, which calls the two methods below

    def _operate_on_continuous_inputs(self: Any, hidden_states: Tensor) -> Any:
        if not _is_fused(self, hidden_states):
            return self.plain._operate_on_continuous_inputs(self, hidden_states)
        with self.on_backend():
            h = norm_silu(self.norm, hidden_states, silu=False)
            if self.use_linear_projection:
                tokens = project(self.proj_in, tokens_of(h))
            else:
                tokens = tokens_of(convolve(self.proj_in, h))
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Any:
        if not _is_fused(self, hidden_states):
            return self.plain._get_output_for_continuous_inputs(
                self, hidden_states, residual, batch_size, height, width, inner_dim
            )
        size = torch.Size((height, width))
        with self.on_backend():
            if self.use_linear_projection:
                return pixels_of(project(self.proj_out, hidden_states, residual=tokens_of(residual)), size)
            return convolve(self.proj_out, pixels_of(hidden_states, size), residual)


def _is_fused(module: Any, x: Tensor) -> bool:
    return is_for_ops(x) and not is_for_training(module, (x,), {})

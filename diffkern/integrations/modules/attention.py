"""diffusers' `Attention` with the processors that it is given by default; one that the user sets runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.modules.base import Accelerated, gated, is_part, is_silent, norm_silu, project, project_all
from diffkern.integrations.modules.heads import joint
from diffkern.models.blocks import pixels_of, tokens_of
from diffkern.ops.attention import attention


class Attention(Accelerated):
    replaces = ("diffusers.models.attention_processor.Attention",)
    ops = ("query_key_value", "linear", "qk_norm_rope", "attention")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return processor_reason(module, PROCESSORS)

    def fused(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        process = PROCESSORS.get(processor_name(self))
        if process is None:
            return NotImplemented
        return process(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


Processor = Callable[..., Any]


def processor_name(attn: Any) -> str:
    """The name of the processor's class if it is one of diffusers' own, else nothing."""
    cls = type(attn.processor)
    return cls.__name__ if cls.__module__.startswith("diffusers.") else ""


def processor_reason(attn: Any, known: dict[str, Processor]) -> str | None:
    """Why an attention runs as its processor says, or None if the processor is one of the known."""
    return None if processor_name(attn) in known else f"its processor is {type(attn.processor).__name__}"


def attend(
    module: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, *, residual: Tensor,
    gate: Tensor | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """module(x) * gate + residual, in the epilogue of the attention's last layer where that is possible. x: [B, T, C].
    gate: [B, C]."""
    if is_part(module, Attention) and processor_name(module) in TOKENS and not kwargs:
        result = self_or_cross(module, x, context, mask, residual=residual, gate=gate)
        if result is not NotImplemented:
            return result
    return gated(module(x, encoder_hidden_states=context, attention_mask=mask, **kwargs), residual, gate)


def self_or_cross(
    attn: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, temb: Tensor | None = None,
    *, residual: Tensor | None = None, gate: Tensor | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """Of pixels [B, C, H, W] or tokens [B, T, C], to themselves or to a context [B, S, D]. residual, gate: as in
    `attend`, for tokens."""
    if kwargs or attn.inner_kv_dim != attn.inner_dim or (attn.rescale_output_factor != 1 and residual is not None):
        return NotImplemented
    around = x if attn.residual_connection else residual
    if attn.residual_connection and residual is not None:
        return NotImplemented
    x = x if attn.spatial_norm is None else attn.spatial_norm(x, temb)
    size = x.shape[2:] if x.dim() == 4 else None
    if size is not None:
        x = x.contiguous(memory_format=torch.channels_last)
        x = tokens_of(x if attn.group_norm is None else norm_silu(attn.group_norm, x, silu=False))
        around = None if around is None else tokens_of(around)
    elif attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    if context is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    packed = processor_name(attn).startswith("Fused")  # unfusing leaves `fused_projections`
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in queries_keys_values(attn, x, context, packed))
    mask = mask_of(mask, k)
    if mask is NotImplemented:
        return NotImplemented
    q, k = (t if norm is None else norm(t) for t, norm in ((q, attn.norm_q), (k, attn.norm_k)))
    out = attention(q, k, v, scale_of(attn), mask)
    out = leave(attn, out, around, gate)
    out = out if size is None else pixels_of(out, size)
    return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def scale_of(attn: Any) -> float | None:
    """The scale of the scores. Processors for PyTorch 2 leave it to the dimension of a head."""
    return None if processor_name(attn).endswith("2_0") else attn.scale


def queries_keys_values(attn: Any, x: Tensor, context: Tensor | None, packed: bool) -> Sequence[Tensor]:
    """The projections [B, T, H D], of tokens that attend to themselves or to a context. packed: whether diffusers has
    fused its layers into one."""
    if packed:
        if context is None:
            return project(attn.to_qkv, x).chunk(3, dim=-1)
        return project(attn.to_q, x), *project(attn.to_kv, context).chunk(2, dim=-1)
    if context is None and attn.norm_q is None:  # norms want queries and keys that lie apart
        return project_all((attn.to_q, attn.to_k, attn.to_v), x)
    other = x if context is None else context
    return project(attn.to_q, x), project(attn.to_k, other), project(attn.to_v, other)


def mask_of(mask: Tensor | None, keys: Tensor) -> Any:
    """What is added to the scores, [B, 1, S or 1, T], of a mask [B, S or 1, T]; NotImplemented for one of another
    length, which diffusers pads."""
    if mask is None:
        return None
    if mask.dim() != 3 or len(mask) not in (1, len(keys)) or mask.shape[-1] != keys.shape[1]:
        return NotImplemented
    return mask[:, None] if mask.dtype == torch.bool else mask[:, None].to(keys.dtype)


def leave(attn: Any, out: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """The way out of an attention: its last layer and dropout, * gate + residual."""
    last, dropout = attn.to_out
    if is_silent(dropout):
        return project(last, out, residual=residual, gate=gate)
    return gated(dropout(project(last, out)), residual, gate)


def added_keys(attn: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Of pixels to a context [B, S, D] and themselves, with projections of their own (unCLIP, Kandinsky, IF)."""
    if kwargs or mask is not None or context is None or attn.inner_kv_dim != attn.inner_dim:
        return NotImplemented
    size, around = x.shape[2:], tokens_of(x)
    x = tokens_of(norm_silu(attn.group_norm, x.contiguous(memory_format=torch.channels_last), silu=False))
    if attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    q, k, v = project(attn.to_q, x), project(attn.add_k_proj, context), project(attn.add_v_proj, context)
    if not attn.only_cross_attention:
        k, v = torch.cat([k, project(attn.to_k, x)], 1), torch.cat([v, project(attn.to_v, x)], 1)
    out = attention(*(t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v)), scale_of(attn))
    return pixels_of(leave(attn, out, around), size)


TOKENS = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")
PROCESSORS: dict[str, Processor] = {
    **dict.fromkeys(TOKENS, self_or_cross),
    **dict.fromkeys(("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"), added_keys),
    **dict.fromkeys(("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"), joint),
}

"""Queries and keys as transformers prepare them, head by head: an RMSNorm and a rotation. And the attention of two
streams of tokens to both, each with projections of its own, as in SD 3 (Esser et al. 2024) and FLUX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.integrations.modules.base import is_part, project, project_all, takes
from diffkern.integrations.modules.tokens import RMSNorm
from diffkern.ops.attention import attention
from diffkern.ops.qk_norm_rope import qk_norm_rope


class Stream(NamedTuple):
    """The names of an attention's parts for one of its streams."""

    apart: tuple[str, str, str]
    packed: str
    norms: tuple[str, str]


IMAGE = Stream(("to_q", "to_k", "to_v"), "to_qkv", ("norm_q", "norm_k"))
PROMPT = Stream(("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", ("norm_added_q", "norm_added_k"))
Rotation = tuple[Tensor, Tensor]  # cosines and sines, float32 [S, D]


def dispatch_reason(attn: Any, name: str) -> str | None:
    """Why an attention runs as its processor says, or None if that is of diffusers' class of this name and was told
    nothing else."""
    processor = attn.processor
    cls = type(processor)
    if cls.__name__ != name or not cls.__module__.startswith("diffusers."):
        return f"its processor is {cls.__name__}"
    backend = getattr(processor, "_attention_backend", None)
    if backend is not None:
        return f"its attention backend is {getattr(backend, 'value', backend)}"
    spread = getattr(processor, "_parallel_config", None) is not None
    return "its tokens are spread over several devices" if spread else None


def is_head_norm(norm: Any, x: Tensor) -> bool:
    """Whether a norm is an RMSNorm with a weight for the last axis of x, and no more."""
    return is_part(norm, RMSNorm) and norm.weight is not None and takes(norm.weight, x)


def norm_rotate(
    norm_q: Any, norm_k: Any, q: Tensor, k: Tensor, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor]:
    """norm_q(q) and norm_k(k), rotated in pairs of neighbours, in one op if the norms are plain RMSNorms. q, k:
    [B, S, H, D]."""
    if is_head_norm(norm_q, q) and is_head_norm(norm_k, k) and norm_q.eps == norm_k.eps:
        return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, *(rotation or (None, None)), eps=norm_q.eps)
    q, k = (t if norm is None else norm(t) for t, norm in ((q, norm_q), (k, norm_k)))
    return (q, k) if rotation is None else qk_norm_rope(q, k, None, None, *rotation)


def queries_keys_values(
    attn: Any, x: Tensor, stream: Stream, packed: bool, norms: bool = True, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, D] each, of tokens x: [B, S, C]. packed: whether one layer projects to all of them."""
    norm_q, norm_k = (getattr(attn, norm, None) if norms else None for norm in stream.norms)
    layers = [getattr(attn, layer) for layer in stream.apart]
    if packed:
        parts: Sequence[Tensor] = project(getattr(attn, stream.packed), x).chunk(3, dim=-1)
    elif norm_q is None and rotation is None:
        parts = project_all(layers, x)
    else:  # norms and rotations want queries and keys that lie apart
        parts = [project(layer, x) for layer in layers]
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in parts)
    return *norm_rotate(norm_q, norm_k, q, k, rotation), v


def joint(attn: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Of an image's tokens [B, S, C] and a prompt's [B, T, C] to both, with those of the image first (SD 3). Returns
    what each stream gets, or without a prompt what the image gets."""
    packed = type(attn.processor).__name__.startswith("Fused")  # that one leaves the norms out
    if kwargs or mask is not None or x.dim() != 3 or (packed and context is None):
        return NotImplemented
    streams = [queries_keys_values(attn, x, IMAGE, packed, not packed)]
    if context is not None:
        streams.append(queries_keys_values(attn, context, PROMPT, packed, not packed))
    out = attend_together(*streams)
    y = attn.to_out[1](project(attn.to_out[0], out[:, : x.shape[1]]))
    if context is None:
        return y
    rest = out[:, x.shape[1] :]
    return y, rest if attn.context_pre_only else project(attn.to_add_out, rest)


def attend_together(*streams: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Attention of the tokens of one stream or more, one behind the other, to all: [B, S, H D]."""
    if len(streams) == 1:
        return attention(*streams[0])
    return attention(*(torch.cat(parts, dim=1) for parts in zip(*streams, strict=True)))

"""xFormers' memory-efficient attention (0.0.32): q, k and v are [B, S, H, D] as here, and a mask is added, [B, H, S, T]
in their dtype."""

from __future__ import annotations

from diffkern.bench.rivals import Args, Bind, Rival, Run, installed
from diffkern.op import Op


def _attention(q, k, v, scale, mask) -> Run:  # type: ignore[no-untyped-def]
    from xformers.ops import memory_efficient_attention

    bias = None if mask is None else mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return lambda: memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).flatten(2)


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    if op.name != "attention":
        return {}
    *_, mask = args
    return {"xFormers": _attention} if mask is None or mask.is_floating_point() else {}


RIVAL = Rival(installed("xformers", "cuda"), _ops)

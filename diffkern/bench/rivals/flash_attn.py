"""FlashAttention-2 as its authors' own package has it (flash-attn 2.8): q, k and v are [B, S, H, D] as here, in 16
bits, with at most 256 numbers a head and no mask."""

from __future__ import annotations

from diffkern.bench.rivals import Args, Bind, Rival, Run, installed
from diffkern.op import Op


def _attention(q, k, v, scale, mask) -> Run:  # type: ignore[no-untyped-def]
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(q, k, v, softmax_scale=scale).flatten(2)


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    if op.name != "attention":
        return {}
    q, *_, mask = args
    return {"flash-attn": _attention} if mask is None and q.element_size() == 2 and q.shape[-1] <= 256 else {}


RIVAL = Rival(installed("flash_attn", "cuda", "pip install flash-attn --no-build-isolation"), _ops)

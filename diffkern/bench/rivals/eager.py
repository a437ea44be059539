"""PyTorch as it is: the op's reference, what one would write without the op, and of a gradient autograd's way back."""

from __future__ import annotations

from diffkern.bench.plain import AUTOGRAD, PLAIN
from diffkern.bench.rivals import Args, Bind, Rival, later
from diffkern.op import Op


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    written = AUTOGRAD.get(op.name) or (later(PLAIN[op.name]) if op.name in PLAIN else None)
    calls: dict[str, Bind] = {}
    if device != "cuda" or not (written or any(b.name == "torch" for b in op.backends)):
        calls["reference"] = later(op.reference)  # on a GPU only in place of what one would write
    if written is not None:
        calls["torch"] = written
    return calls


RIVAL = Rival(ops=_ops)

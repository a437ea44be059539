"""torch.compile of what one would write, on a CPU of the reference as well; and of networks, in channels_last.

On a GPU with max-autotune, as fast as it gets outside a graph of its own, but for ops that multiply: products there are
a library's either way. On a CPU by default: of one op max-autotune would tune products with constant weights, and the
weights of an op are arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffkern.bench.networks import Make, Prepare, accelerated, by_diffusers, channels_last
from diffkern.bench.plain import AUTOGRAD, PLAIN, PRODUCTS, composed
from diffkern.bench.rivals import Args, Bind, Rival, later
from diffkern.op import Op


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    torch.compiler.reset()  # of the last op, whose guards would be asked first
    functions = {"reference": op.reference, "torch": PLAIN.get(op.name)}
    if device == "cuda":
        functions = {} if op.name in AUTOGRAD else {"torch": composed(op)}
    mode = "max-autotune-no-cudagraphs" if device == "cuda" and op.name not in PRODUCTS else "default"
    return {
        f"{name}, compiled": later(torch.compile(function, fullgraph=True, mode=mode))
        for name, function in functions.items()
        if function is not None
    }


def _network(prepare: Prepare, mode: str) -> Make:
    def change(model: nn.Module) -> Any:
        return torch.compile(model, mode=mode)

    return by_diffusers(prepare, change)


RIVAL = Rival(
    ops=_ops,
    networks={
        "torch.compile": _network(channels_last, "default"),
        "torch.compile, max-autotune": _network(channels_last, "max-autotune"),
        "diffusers, accelerated, torch.compile": _network(accelerated, "default"),
    },
)

"""Liger Kernel's Triton kernels (liger-kernel 0.8), by their functions: RMSNorm, LayerNorm with weight and bias, and
the product of GEGLU and SwiGLU after a linear layer of PyTorch. Its GELU is the approximation by tanh."""

from __future__ import annotations

import torch.nn.functional as F

from diffkern.bench.rivals import Args, Bind, Rival, Run, installed
from diffkern.op import Op


def _rms_norm(x, weight, eps) -> Run:  # type: ignore[no-untyped-def]
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda: liger_rms_norm(x, weight, eps)


def _layer_norm(x, shift, scale, weight, bias, eps) -> Run:  # type: ignore[no-untyped-def]
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda: liger_layer_norm(x, weight, bias, eps)


def _gated(x, weight, bias, activation, *rest) -> Run:  # type: ignore[no-untyped-def]
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    activated = {"geglu": liger_geglu, "swiglu": liger_swiglu}[activation]

    def run():  # type: ignore[no-untyped-def]
        value, gate = F.linear(x, weight, bias).chunk(2, -1)
        return activated(gate, value)

    return run


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    if op.name == "rms_norm":
        return {"Liger": _rms_norm}
    if op.name == "layer_norm_modulate":
        _, shift, scale, weight, bias, _ = args
        plain = shift is None and scale is None and weight is not None and bias is not None
        return {"Liger": _layer_norm} if plain else {}
    if op.name == "linear":
        *_, activation, residual, gate = args
        return {"Liger": _gated} if activation in ("geglu", "swiglu") and residual is None and gate is None else {}
    return {}


RIVAL = Rival(installed("liger_kernel", "cuda"), _ops)

"""The GroupNorm with SiLU of NVIDIA's apex (apex.contrib.group_norm, 2025): channels_last pictures, 16 or 32 groups,
and the numbers of channels of a list. The rest it gives to PyTorch, which is timed already."""

from __future__ import annotations

import torch

from diffkern.bench.rivals import Args, Bind, Rival, Run, installed
from diffkern.layout import memory_format
from diffkern.op import Op


def _group_norm_silu(x, groups, weight, bias, eps, silu, *rest) -> Run:  # type: ignore[no-untyped-def]
    from apex.contrib.group_norm import GroupNorm

    if groups not in GroupNorm.SUPPORTED_GROUPS or x.shape[1] not in GroupNorm.SUPPORTED_CHANNELS:
        raise NotImplementedError(f"has no kernel for {groups} groups of {x.shape[1]} channels")
    norm = GroupNorm(groups, x.shape[1], eps, device=x.device, dtype=weight.dtype, act="silu" if silu else "")
    norm.weight.data, norm.bias.data = weight, bias
    return lambda: norm(x)


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    if op.name != "group_norm_silu" or any(a is not None for a in args[6:]):  # nothing added, shifted or beside it
        return {}
    x, _, weight, bias, *_ = args
    fits = memory_format(x) is torch.channels_last and weight is not None and bias is not None
    return {"apex": _group_norm_silu} if fits else {}


RIVAL = Rival(installed("group_norm_cuda", "cuda", "build apex with its --group_norm"), _ops)

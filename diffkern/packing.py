"""Packed weights: copies in the layout that a kernel multiplies with, made in the first call that needs them.

Plain PyTorch lays out the weight again in every call. A copy is kept as long as its weight lives, and is made anew when
the weight has changed: its version counter, address, shape, strides and dtype are compared in every call, and 64 of its
values. Those are for changes that PyTorch does not count, as in `weight.data += delta`: one that leaves all 64 as they
are goes unseen. Tensors made in inference mode have no version counter: their copies are never kept.

It costs the memory of the weights once more: twice that of 16-bit ones where this CPU computes them in float32. A 3 x 3
convolution by Winograd's way takes 16 float32 numbers for 9, and 9 for a picture that is doubled first; in tiles of
4 x 4 it takes 36 and 25. oneDNN's convolutions have a copy for each size of picture they are given. DIFFKERN_PACK=0
keeps no copy at all: every call packs anew.

A weight that safetensors maps from its file is only read to be packed. On Linux its memory is then given back: what is
read of it later comes from the file again. It is compared without reading a value, by whether any of its pages was
written, which tells every change; one that was written is a weight like all others from then on.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Packed(NamedTuple):
    owner: weakref.ref[Tensor]
    mapping: Tensor | None  # the weight, if it is of a file: no other can come to its address as long as this is kept
    stamp: tuple[int, int]
    copy: Tensor


_kept: dict[tuple[int, Hashable], _Packed] = {}


def packed(weight: Tensor, how: Hashable, pack: Callable[[], Tensor]) -> Tensor:
    """The copy that `pack()` makes of a weight, made again only when the weight has changed. `how` names all that the
    copy depends on beside the weight. A view, made anew in every call, is known by what it is a view of."""
    if weight.is_inference() or not _keeps():
        return pack()
    owner = weight._base
    if owner is None:
        owner = weight
    else:
        how = (how, weight.storage_offset(), weight.shape, weight.stride())
    key = (id(owner), how)
    known = _kept.get(key)
    if known is not None and known.owner() is owner and known.stamp == _stamp(weight, known.mapping is not None):
        return known.copy
    mapped = torch.ops.diffkern_C.of_a_file(weight)
    stamp, copy = _stamp(weight, mapped), pack()
    if mapped:
        torch.ops.diffkern_C.give_back(weight)
    forget = weakref.ref(owner, lambda _: _kept.pop(key, None))
    _kept[key] = _Packed(forget, weight.detach() if mapped else None, stamp, copy)
    return copy


def _stamp(weight: Tensor, mapped: bool) -> tuple[int, int]:
    return weight._version, torch.ops.diffkern_C.fingerprint(weight, mapped)


@functools.cache
def _keeps() -> bool:
    return os.environ.get("DIFFKERN_PACK") != "0"


@functools.cache
def compute_dtype(dtype: torch.dtype, convolution: bool = False) -> torch.dtype:
    """The dtype that a product is computed in: the tensors' own where the CPU multiplies it faster. Measured with
    AVX-512: without instructions for bfloat16 its products take 1.2 to 1.9 times as long as float32 ones with their
    conversions, with AVX512_BF16 half as long; without AMX float16 convolutions take 1.7 times as long, and float16
    linear layers no less."""
    if dtype == torch.bfloat16:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif dtype == torch.float16:
        fast = torch.cpu._is_amx_fp16_supported if convolution else torch.ops.mkldnn._is_mkldnn_fp16_supported
        native = fast()
    else:
        native = True
    return dtype if native else torch.float32


def kept_bytes() -> int:
    """The memory that packed copies take now."""
    return sum(p.copy.numel() * p.copy.element_size() for p in _kept.values())


def prepare(model: nn.Module, *example: Any) -> nn.Module:
    """Pack the weights of a model written in diffkern's ops ahead of its first call, by calling it once with `example`,
    its arguments. Returns the model."""
    with torch.no_grad():
        model(*example)
    return model

"""Packed weights: copies in the layout that a kernel multiplies with, made in the first call that needs them.

Plain PyTorch lays out the weight again in every call. A copy is kept as long as its weight lives, and is made anew when
the weight has changed: its version counter, address, shape, strides and dtype are compared in every call, and 64 of its
values. Those are for changes that PyTorch does not count, as in `weight.data += delta`: one that leaves all 64 as they
are goes unseen. Tensors made in inference mode have no version counter: their copies are never kept.

It costs the memory of the weights once more: twice that of 16-bit ones where this CPU computes them in float32, but for
the 3 x 3 convolutions in Winograd's larger tiles, which keep the weight's own type. oneDNN's convolutions have a copy
for each size of picture they are given.
DIFFKERN_PACK=0 keeps no copy at all: every call packs anew.

A weight that safetensors maps from its file is only read to be packed. On Linux its memory is then given back: what is
read of it later comes from the file again. It is compared without reading a value, by whether any of its pages was
written, which tells every change; one that was written is a weight like all others from then on.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from diffkern.available import availability
from diffkern.dispatch import is_traced
from diffkern.layout import requires_grad, side_by_side


class _Known(NamedTuple):
    """A weight as it was when it was packed."""

    owner: weakref.ref[Tensor]
    mapping: Tensor | None  # the weight, if it is of a file: no other can come to its address as long as this is kept
    stamp: tuple[int, int]

    def is_still(self, weight: Tensor) -> bool:
        base = weight._base  # as in _owner, without a call
        owner = weight if base is None else base
        return self.owner() is owner and self.stamp == _stamp(weight, self.mapping is not None)


class _Packed(NamedTuple):
    weights: list[_Known]
    copy: Tensor

    def is_still_of(self, weights: Sequence[Tensor]) -> bool:
        return all(map(_Known.is_still, self.weights, weights))


_kept: dict[tuple[Hashable, ...], _Packed] = {}


def packed(weights: Sequence[Tensor], how: Hashable, pack: Callable[[], Tensor]) -> Tensor:
    """The copy that `pack()` makes of one weight or of several, made again only when one of them has changed. `how`
    names all that the copy depends on beside the weights. A view, made anew in every call, is known by what it is a
    view of."""
    if not _keeps() or any(w.is_inference() for w in weights):
        return pack()
    if _noting.noted is None:
        return _known(weights, how, pack).copy
    with _disable_current_modes():  # what packs a weight is no part of what a network runs
        found = _known(weights, how, pack)
    _noting.noted.add(found, weights)
    return found.copy


def _known(weights: Sequence[Tensor], how: Hashable, pack: Callable[[], Tensor]) -> _Packed:
    key = (how, *(id(w) if w._base is None else _place(w) for w in weights))
    known = _kept.get(key)
    if known is not None and known.is_still_of(weights):
        return known
    _keep_freed_memory()
    mapped = [torch.ops.diffkern_C.of_a_file(w) for w in weights]
    stamps, copy = [_stamp(w, m) for w, m in zip(weights, mapped, strict=True)], pack()
    found = []
    for weight, of_a_file, stamp in zip(weights, mapped, stamps, strict=True):
        if of_a_file:
            torch.ops.diffkern_C.give_back(weight)
        forget = weakref.ref(_owner(weight), lambda _: _kept.pop(key, None))
        found.append(_Known(forget, weight.detach() if of_a_file else None, stamp))
    _kept[key] = _Packed(found, copy)
    return _kept[key]


class _Noting(threading.local):
    noted: Noted | None = None


_noting = _Noting()


class Noted:
    """The packed weights that were asked for in a block, none of which it holds, and whether they still are those of
    their weights."""

    def __init__(self) -> None:
        self.ids: set[int] = set()  # of the copies, in the block
        self.found: list[tuple[list[_Known], list[Callable[[], Tensor | None]]]] = []

    def __enter__(self) -> Noted:
        self.before, _noting.noted = _noting.noted, self
        return self

    def __exit__(self, *error: object) -> None:
        _noting.noted = self.before

    def add(self, found: _Packed, weights: Sequence[Tensor]) -> None:
        if id(found.copy) not in self.ids:
            self.ids.add(id(found.copy))
            self.found.append((found.weights, [_reference(w) for w in weights]))

    def hold(self) -> bool:
        for known, references in self.found:
            for weight, reference in zip(known, references, strict=True):
                now = reference()
                if now is None or not weight.is_still(now):
                    return False
        return True


def _reference(weight: Tensor) -> Callable[[], Tensor | None]:
    """Finds a weight again, or the view that it is, unless it is gone."""
    if weight._base is None:
        return weakref.ref(weight)
    owner, place = weakref.ref(weight._base), (weight.shape, weight.stride(), weight.storage_offset())

    def view() -> Tensor | None:
        base = owner()
        return None if base is None else base.as_strided(*place)

    return view


def packed_together(weights: Sequence[Tensor]) -> Tensor | None:
    """Weights of layers with one input, one below the other, for one product in place of many: as they lie in memory
    (`lay_side_by_side`), or on a CPU a copy that is kept. None where gradients must find their way back to each, and
    where every call would have to copy them."""
    whole = side_by_side(weights)
    if whole is not None or requires_grad(weights) or is_traced():
        return whole
    if not all(type(w) in (Tensor, nn.Parameter) and w.is_cpu and not w.is_inference() for w in weights):
        return None
    if availability("cpu") is not None:  # asked last: on a GPU nobody needs that library
        return None
    return packed(weights, "together", lambda: torch.cat([w.detach() for w in weights]))


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc keep up to 64 MB of freed memory for the next call. What is free at the end of its heap it gives back
    beyond twice the largest block that was ever mapped and freed: within a call of a network, which then waits for the
    same pages again and again. A block of 32 MB, the largest that counts, tells it what such calls take. Nothing is
    written to that one, so that it takes no memory; other allocators do not mind it."""
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")


def _owner(weight: Tensor) -> Tensor:
    return weight if weight._base is None else weight._base


def _place(view: Tensor) -> Hashable:
    return id(view._base), view.storage_offset(), view.shape, view.stride()


def _stamp(weight: Tensor, mapped: bool) -> tuple[int, int]:
    return weight._version, torch.ops.diffkern_C.fingerprint.default(weight, mapped)


@functools.cache
def _keeps() -> bool:
    return os.environ.get("DIFFKERN_PACK") != "0"


@functools.cache
def vectors() -> str | None:
    """The vectors that our own products are computed in, "AVX2" or "AVX512", and None on a CPU where nobody has timed
    them."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in ("AVX2", "AVX512") else None


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

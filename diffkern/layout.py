"""What the ops agree on about numbers and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.dispatch import is_traced

FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float32, or float64 for float64 input (the oracle)."""
    return torch.promote_types(dtype, torch.float32)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of an op's result: channels_last if x has that layout and no other, else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def is_dense(x: Tensor) -> bool:
    """Contiguous, or channels_last: the layouts that kernels read."""
    return x.is_contiguous() or memory_format(x) is torch.channels_last


def per_sample(v: Tensor, x: Tensor) -> Tensor:
    """A per-sample vector [B], shaped to broadcast against x [B, ...]."""
    return v.reshape(-1, *(1,) * (x.dim() - 1))


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """A per-sample, per-channel matrix [B, C], shaped to broadcast against x [B, C, ...]."""
    return v.reshape(*v.shape, *(1,) * (x.dim() - 2))


def rows_of(table: Tensor, row: Tensor) -> Tensor:
    """table[row] for the row of each sample: [B, ...], float. A row that there is not is NaN, and so is all that is
    made of it, for that sample alone: a mark that needs no state, waits for nothing and can be recorded in a CUDA
    graph. The nearest row would give a result that looks right; PyTorch's own check on a GPU ends the process's use of
    it."""
    outside = len(table)
    there = (row >= 0) & (row < outside)
    return F.pad(table, (0, 0) * (table.dim() - 1) + (0, 1), value=torch.nan).index_select(0, row.where(there, outside))


def dense(args: tuple[object, ...]) -> tuple[object, ...]:
    """What kernels are called with: every tensor dense, and in the layout of the first."""
    layout, made = None, list(args)
    for i, a in enumerate(args):  # a loop: generators would take twice the time, at every call of an op
        if isinstance(a, Tensor):
            layout = layout or memory_format(a)
            made[i] = a.contiguous(memory_format=layout) if a.dim() == 4 else a.contiguous()
    return tuple(made)


def requires_grad(parts: Sequence[Tensor]) -> bool:
    """Whether what is made of the tensors now has to leave a way back for gradients."""
    return torch.is_grad_enabled() and any(part.requires_grad for part in parts)


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that differ in their first size only, one below the other: a view, if that is how they lie in memory
    (`lay_side_by_side`), else None. None also where gradients are wanted, since autograd would see the first alone, and
    where memory is not what it looks like."""
    if requires_grad(parts) or is_traced():
        return None
    first, rows = parts[0], 0
    memory, start = first.untyped_storage()._cdata, first.storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != memory or part.storage_offset() != start:
            return None
        if not part.is_contiguous() or part.shape[1:] != first.shape[1:]:
            return None
        start, rows = start + part.numel(), rows + part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors that differ in their first size only, one below the other, without a copy where that is how they lie."""
    whole = side_by_side(parts)
    return torch.cat(list(parts)) if whole is None else whole


@torch.no_grad()
def lay_side_by_side(parts: Sequence[Tensor]) -> None:
    """Move parameters into one piece of memory, one below the other. They stay what they are; a change of one in place
    is seen in the whole."""
    whole = torch.cat([part.detach() for part in parts])
    for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = place


def fast_dtype(dtype: torch.dtype) -> bool | str:
    """True for the dtypes that kernels take, else the reason why not."""
    return dtype in FAST_DTYPES or f"takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"


def of_one_dtype(x: Tensor, *others: Tensor | None) -> bool | str:
    """True if all have the dtype of x, else the reason why kernels do not take them."""
    dtype = x.dtype
    for t in others:  # a generator would take twice the time
        if t is not None and t.dtype is not dtype:
            return "takes tensors of one dtype"
    return True

"""What an op says of arguments that do not fit together: one sentence, whichever backend would have run. The kernels in
C++ say the same of themselves (csrc/common/check.h), since they can be called without the op; the others trust it."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def refuse(op: str, sentence: str) -> NoReturn:
    raise RuntimeError(f"diffkern::{op}: {sentence}")


def unfit(op: str, name: str, must: str, got: object) -> NoReturn:
    refuse(op, f"{name} must be {must}, got {list(got) if isinstance(got, torch.Size) else got}")


def shaped(op: str, name: str, t: Tensor | None, *shape: int) -> None:
    """Refuse a tensor of another shape. None fits."""
    if t is not None and t.shape != shape:
        unfit(op, name, str(list(shape)), t.shape)


def at_least(op: str, what: str, number: int, least: int) -> None:
    if number < least:
        refuse(op, f"{what} {number}, allowed are {least} and above")


def together(op: str, **pair: Tensor | None) -> None:
    """Refuse one of two tensors."""
    (first, a), (second, b) = pair.items()
    if (a is None) != (b is None):
        refuse(op, f"give {first} and {second} together or neither")


def integers(op: str, name: str, t: Tensor | None, *shape: int) -> None:
    """Refuse what is not int64 of a shape: a kernel would read the bytes of another type as if they were."""
    if t is not None and (t.shape != shape or t.dtype != torch.int64):
        unfit(op, name, f"contiguous int64 {list(shape)}", t.shape)


def batched(op: str, name: str, t: Tensor) -> int:
    """The number of samples in t."""
    if not t.dim():
        refuse(op, f"{name} must have a batch axis, got []")
    return t.shape[0]


def alike(op: str, name: str, t: Tensor | None, like: Tensor, batch: int) -> None:
    """Refuse a tensor that has not, but for the batch, the shape of `like`."""
    if t is None or (t.shape == like.shape and like.shape[0] == batch):
        return
    shape = list(like.shape)
    if list(t.shape) != [batch, *shape[1:]]:
        refuse(op, f"{name} must have batch {batch} and otherwise the shape {shape}, got {list(t.shape)}")


def rows_known(op: str, name: str, row: Tensor, rows: int) -> None:
    """Refuse a row that a table has not, where the host knows it: of a tensor on the CPU. Elsewhere to look would be to
    wait for the device; what becomes of such a row there says `layout.rows_of`."""
    if type(row) is not Tensor or row.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for i, r in enumerate(row.tolist()):
        if not 0 <= r < rows:
            refuse(op, f"{name}[{i}] is {r}, allowed are 0 to {rows - 1}")

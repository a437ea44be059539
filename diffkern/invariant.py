"""Batch invariance: a sample's bits do not depend on what else is in its batch.

Every kernel that diffkern owns has it. Matrix products of libraries do not promise it: they choose the order of a sum
by the size of the batch. Under `batch_invariant()` they are called so that it cannot matter.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_on: contextvars.ContextVar[bool] = contextvars.ContextVar("diffkern_batch_invariant", default=False)
# Rows of a matrix that are multiplied at once: always so many, zeros behind the last.
_ROWS = 16


def is_on() -> bool:
    """Whether this is under `batch_invariant()`."""
    return _on.get()


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside the block one sample alone equals the same sample in a batch, bit for bit, on one machine with one number
    of threads: in diffkern's ops, and in any model's linear layers, convolutions and scaled dot-product attention.

    Libraries are given one sample at a time, and of a plain matrix 16 rows at a time. What needs a gradient is computed
    as ever. Other products of a model, such as a matmul or an einsum, are left as they are."""
    token = _on.set(True)
    try:
        with _Apart():
            yield
    finally:
        _on.reset(token)


def apart(run: Callable[..., Any], *batches: Tensor | None) -> Any:
    """run(*batches), one tensor or several, for each sample alone. A batch is [B, ...]; None is passed on."""
    n = len(next(t for t in batches if t is not None))
    if n <= 1:
        return run(*batches)
    # Copies: a sum may depend on how its numbers are aligned, and slices of a batch lie anywhere.
    made = [run(*(None if t is None else t[i : i + 1].clone() for t in batches)) for i in range(n)]
    return torch.cat(made) if isinstance(made[0], Tensor) else tuple(map(torch.cat, zip(*made, strict=True)))


def rows(run: Callable[..., Tensor], *matrices: Tensor | None) -> Tensor:
    """run(*matrices), whose rows are the samples: as many rows at a time whatever their number."""
    n = len(next(t for t in matrices if t is not None))
    if n == 0:
        return run(*matrices)

    def block(t: Tensor | None, i: int) -> Tensor | None:
        return None if t is None else F.pad(t[i : i + _ROWS].clone(), (0, 0, 0, max(0, i + _ROWS - n)))

    return torch.cat([run(*(block(t, i) for t in matrices)) for i in range(0, n, _ROWS)])[:n]


class _Apart(TorchFunctionMode):
    """PyTorch's own products, as a model calls them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and not _trains(*args, *kwargs.values()):
            return _PRODUCTS[func](func, *args, **kwargs)
        return func(*args, **kwargs)


def _trains(*args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.dim() < 2:
        return func(input, weight, bias)
    return (rows if input.dim() == 2 else apart)(lambda x: func(x, weight, bias), input)


def _convolution(func: Any, input: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
    if input.dim() < weight.dim():
        return func(input, weight, *rest, **more)
    return apart(lambda x: func(x, weight, *rest, **more), input)


def _attention(func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any,
               **more: Any) -> Tensor:  # fmt: skip
    if query.dim() < 3:
        return func(query, key, value, attn_mask, *rest, **more)
    return masked(lambda q, k, v, mask: func(q, k, v, mask, *rest, **more), query, key, value, attn_mask)


def masked(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """run(q, k, v, mask), for each sample alone: the mask may be one for all."""
    if mask is not None and mask.dim() == q.dim() and len(mask) == len(q):
        return apart(run, q, k, v, mask)
    return apart(lambda q, k, v: run(q, k, v, mask), q, k, v)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.scaled_dot_product_attention: _attention,
}

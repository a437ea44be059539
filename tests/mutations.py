"""Calls of ops that nobody should make, and everybody does: a good call, with one or two of its arguments made wrong or
merely unusual. What an op may do with one: give the reference's answer, or one clear error."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIZES = (0, 1, 2, 3, 7, 16, 17, 33, 64)
MOST = 1 << 17  # elements of a tensor
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip
ROWS = (-1, -(1 << 63), 1 << 31, 1 << 40, (1 << 63) - 1, 5, 999, 1000)
VALUES = (torch.nan, torch.inf, -torch.inf, 1e4, 1e-40, 0.0)
# None that asks for as much memory as there might be: too much, or little.
INTEGERS = (-1, 0, 1, 2, 3, 5, 1 << 16, 1 << 45, (1 << 62) + 1, (1 << 63) - 1, -(1 << 63), 1 << 64)
FLOATS = (0.0, -1.0, 1e-12, 1e30, torch.nan, torch.inf)
WORDS = ("", "silu", "SILU", "none\0", "é", "x" * 5000)
LISTS: tuple[list[Any], ...] = (
    [],
    [0],
    [-1],
    [3],
    [1, 1, 1, 1],
    [0, 1, 2, 3],
    [2, 0, 5],
    [1 << 62, 4],
    [1 << 32, 1 << 32],
    [1.5],
    ["x"],
)
WRONG: tuple[Any, ...] = (
    None,
    "x",
    1.5,
    -3,
    [],
    [torch.ones(2)],
    {},
    object(),
    torch.float32,
    torch.ones(()),
    torch.ones(3, 5),
)


def _resized(x: Tensor, axis: int, size: int) -> Tensor:
    """x with another size of one axis, its values repeated, unless that makes too many."""
    if x.numel() * size > MOST * max(1, x.shape[axis]):
        return x
    if not x.shape[axis]:
        return x.new_ones([size if i == axis else n for i, n in enumerate(x.shape)])
    return x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])


def shape(x: Tensor, r: random.Random) -> Tensor:
    """Another size of one axis, an axis more, less or moved."""
    if not x.dim() or r.random() < 0.2:
        return x.unsqueeze(r.randint(0, x.dim()))
    axis = r.randrange(x.dim())
    choice = r.random()
    if choice < 0.15 and x.shape[axis]:
        return x.select(axis, 0)
    if choice < 0.3:
        return x.transpose(axis, 0)
    return _resized(x, axis, r.choice((*SIZES[:3], x.shape[axis] + 1, max(0, x.shape[axis] - 1), 2 * x.shape[axis])))


def others_of(x: Tensor) -> list[Tensor]:
    """x with one more in each of its axes, without its first axis, and with an axis more."""
    return [*(_resized(x, axis, x.shape[axis] + 1) for axis in range(x.dim())), x[0], x[None]]


def strides(x: Tensor, r: random.Random) -> Tensor:
    """The same values in another place: where a kernel that goes by a pointer would read something else."""
    if not x.dim():
        return x
    axis = r.randrange(x.dim())
    turned = x.transpose(axis, -1).contiguous().transpose(axis, -1)
    wide = torch.stack([x, torch.full_like(x, 1)], -1)[..., 0]
    shifted = torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)
    backwards = x.flip(axis).contiguous().flip(axis)
    choices = [turned, wide, shifted, backwards, torch._neg_view(-x) if x.dtype != torch.bool else x]
    if x.dim() == 4:
        choices.append(x.contiguous(memory_format=torch.channels_last))
    if x.dim() > 1:
        choices.append(torch.cat([x, x], axis).narrow(axis, 0, x.shape[axis]))
    return r.choice(choices)


def expanded(x: Tensor, r: random.Random) -> Tensor:
    """One entry of an axis, which stands for all: stride 0."""
    if not x.numel() or not x.dim():
        return x
    axis = r.randrange(x.dim())
    return x.narrow(axis, 0, 1).expand(x.shape)


def values(x: Tensor, r: random.Random) -> Tensor:
    """A NaN, an infinity, a subnormal or a large number somewhere; a row number that no table has."""
    if not x.numel():
        return x
    x, place = x.clone(), tuple(r.randrange(n) for n in x.shape)
    if x.is_floating_point():
        x[place] = r.choice(VALUES)
    elif x.dtype == torch.int64:
        x[place] = r.choice(ROWS)
    return x


def dtype(x: Tensor, r: random.Random) -> Tensor:
    return x.to(r.choice(DTYPES))


def device(x: Tensor, r: random.Random) -> Tensor:
    """Somewhere else, or not in strided memory at all."""
    return x.to("meta") if r.random() < 0.7 else x.to_sparse()


def wrong(_: Any, r: random.Random) -> Any:
    return r.choice(WRONG)


OF_TENSORS: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    shape, shape, strides, strides, expanded, values, values, dtype, device, wrong,
)  # fmt: skip


def _other(a: Any, args: tuple[Any, ...], r: random.Random) -> Any:
    """Something else for one argument."""
    if isinstance(a, Tensor):
        if a.layout != torch.strided:
            return a
        return r.choice(OF_TENSORS)(a, r)
    if r.random() < 0.25:
        return wrong(a, r)
    for kind, choices in ((bool, (True, False)), (int, INTEGERS), (float, FLOATS), (str, WORDS), (list, LISTS)):
        if isinstance(a, kind):
            return r.choice(choices)
    if isinstance(a, torch.dtype):
        return r.choice(DTYPES)
    # Nothing was given: a tensor that one was, or a number, or words.
    tensors = [t for t in args if isinstance(t, Tensor)]
    return r.choice([*tensors, r.choice(INTEGERS), r.choice(FLOATS), r.choice(LISTS)])


def _resize_all(args: tuple[Any, ...], r: random.Random) -> tuple[Any, ...]:
    """Another size wherever one size stands, so that the arguments fit together as before."""
    sizes = sorted({n for a in args if isinstance(a, Tensor) for n in a.shape})
    if not sizes:
        return args
    old, new = r.choice(sizes), r.choice(SIZES)

    def resized(a: Any) -> Any:
        if isinstance(a, Tensor):
            for axis, n in enumerate(a.shape):
                if n == old:
                    a = _resized(a, axis, new)
        return a

    return tuple(resized(a) for a in args)


def rearrange(args: tuple[Any, ...], r: random.Random) -> tuple[Any, ...]:
    """The arguments, all to other sizes or not, in other places of the memory and with other values: what fits
    together still does."""
    made = list(_resize_all(args, r) if r.random() < 0.5 else args)
    for i in r.sample(range(len(made)), r.randint(1, 2)):
        if isinstance(made[i], Tensor):
            made[i] = r.choice((strides, expanded, values))(made[i], r)
    return tuple(made)


def mutate(args: tuple[Any, ...], r: random.Random) -> tuple[Any, ...]:
    """The arguments, one or two of them changed, or all to other sizes."""
    changed = _resize_all(args, r) if r.random() < 0.3 else args
    made = list(changed)
    for _ in range(r.choice((0, 1, 1, 2)) if changed is not args else r.choice((1, 1, 2))):
        i = r.randrange(len(made))
        made[i] = _other(made[i], tuple(made), r)
    return tuple(made)

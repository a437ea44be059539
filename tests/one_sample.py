"""Calls of an op for a batch and for one sample of it, whose result must not depend on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffkern.layout import is_dense
from diffkern.op import Op

WEIGHT_BIAS = ("weight", "bias")
SHARED = ("table", "alpha_sigma", "weight", "bias", "cos", "sin", *(f"{x}_{p}" for x in "qkv" for p in WEIGHT_BIAS))


def calls(op: Op, dtype: torch.dtype, workloads: bool) -> Iterator[tuple[str, tuple[object, ...], int]]:
    """The samples of an op that have a batch, on the CPU: their names, arguments and batches."""
    assert op.make_samples is not None
    for sample in op.make_samples("cpu", dtype):
        if sample.workload != workloads:
            continue
        args = sample.args()
        batch = next(len(a) for a in args if isinstance(a, Tensor))
        if batch > 1:
            yield sample.name, args, batch


def alone(op: Op, args: tuple[object, ...], i: int) -> list[object]:
    """The call for sample i only. Tables and parameters are shared; a guided model output has two entries a sample."""
    batch = next(len(a) for a in args if isinstance(a, Tensor))

    def pick(parameter: str, a: object) -> object:
        if not isinstance(a, Tensor) or parameter in SHARED:
            return a
        layout = torch.contiguous_format if a.is_contiguous() or a.dim() != 4 else torch.channels_last
        picked = a[[i]] if len(a) == batch else a[[i, batch + i]]
        return picked.contiguous(memory_format=layout) if is_dense(a) else picked

    return [pick(parameter, a) for parameter, a in zip(op.signature.parameters, args, strict=True)]


def assert_own_bits(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Neither the number of threads nor the other samples of a batch change a bit of run(x). x: [5, ...]."""
    threads = torch.get_num_threads()

    def by(n: int, x: Tensor) -> Tensor:
        torch.set_num_threads(n)
        return run(x)

    try:
        one, two, five = (by(n, x) for n in (1, 2, 5))
        alone = torch.cat([by(2, x[i : i + 1]) for i in range(5)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.equal(one, five)
    assert torch.equal(one, alone)

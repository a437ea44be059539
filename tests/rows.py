"""Rows that a table has not: where only the device knows of one, its sample is NaN and all others are as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffkern.op import OPS

# The ops that look up a row of a table for each sample: where the table is, where the rows are, how many of the table's
# last rows no sample may be at, and the small samples to ask.
LOOKUPS = {
    "add_noise": (2, 1, 0, ("with the noise",)),
    "sampler_step": (2, 3, 1, ("square", "odd, channels_last")),
    "vlb_term": (3, 4, 0, ("square", "square, learned variance")),
}


def wild_calls(name: str, device: str, dtype: torch.dtype) -> Iterator[tuple[tuple[Any, ...], list[tuple[Any, ...]]]]:
    """Good calls of an op, and of each the same with the second sample's row outside the table."""
    table, at, end, names = LOOKUPS[name]
    for sample in OPS[name].make_samples(device, dtype):
        if sample.name in names:
            args = OPS[name].bind(*sample.args())
            wild = []
            for row in (-1, len(args[table]) - end, 1 << 40, -(1 << 63)):
                rows = args[at].clone()
                rows[1] = row
                wild.append((*args[:at], rows, *args[at + 1 :]))
            yield args, wild


def check_rows_outside(
    name: str, run: Callable[..., tuple[Tensor, ...]], device: str, dtype: torch.dtype = torch.float32
) -> None:
    for good, wild in wild_calls(name, device, dtype):
        expected = run(*good)
        assert not any(e.isnan().any() for e in expected)
        for got in map(run, *zip(*wild, strict=True)):
            for i, (g, e) in enumerate(zip(got, expected, strict=True)):
                marked = torch.arange(len(g), device=g.device) % len(good[0]) == 1
                if (name, i) == ("add_noise", 1):  # the noise is of no row
                    marked = torch.zeros_like(marked)
                assert g[marked].isnan().all()
                assert torch.equal(g[~marked], e[~marked])

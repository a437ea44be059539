"""What a curve of cost over size says: where it jumps out of line, how fast it grows, and what of it is fixed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from diffkern.bench import record

LIMIT = 1.3  # times what the neighbours predict: more is a cliff


class Cliff(NamedTuple):
    """A size that costs more than its neighbours say, and how many times as much: the median over the rounds, with the
    20th and the 80th percentile."""

    size: int
    times: float
    p20: float
    p80: float


def between(low: tuple[float, float], high: tuple[float, float], size: float) -> float:
    """The cost of a size between two others, (size, cost) each, by the power law cost = c * size^k through them."""
    (a, cost), (b, other) = low, high
    return cost * (other / cost) ** (math.log(size / a) / math.log(b / a))


def cliffs(sizes: Sequence[int], costs: Sequence[Sequence[float]], limit: float = LIMIT) -> list[Cliff]:
    """The sizes that cost more than `limit` times what the two sizes beside them predict, beyond noise: in more than
    four fifths of the rounds. A jump that lasts is found where it begins, if it is one by limit^2 between sizes that
    are evenly apart. The first and the last size have one neighbour only, and are not judged.

    sizes: ascending, above 0. costs: of each size one in every round, above 0; sizes are compared within a round, so
    that a machine that slows down makes no cliffs."""
    found = []
    for i in range(1, len(sizes) - 1):
        ratios = [
            here / between((sizes[i - 1], low), (sizes[i + 1], high), sizes[i])
            for low, here, high in zip(costs[i - 1], costs[i], costs[i + 1], strict=True)
        ]
        spread = record.spread(ratios)
        if spread["p20"] > limit:
            found.append(Cliff(sizes[i], spread["median"], spread["p20"], spread["p80"]))
    return found


def exponent(counts: Sequence[float], costs: Sequence[float], without: Collection[float] = ()) -> float | None:
    """k of cost = c * n^k, over the last third of the range of n, as its logarithm goes: 0 for what is fixed, 1 for
    what is linear, 2 for what is quadratic. counts: n of each size, ascending, above 0. without: those that are left
    out, such as cliffs. None where that third holds no two n of which one is half as large again as the other: what
    lies closer together says more of noise."""
    kept = [(math.log(n), math.log(cost)) for n, cost in zip(counts, costs, strict=True) if n not in without]
    if not kept:
        return None
    begin = kept[0][0] + (kept[-1][0] - kept[0][0]) * 2 / 3
    last = [(n, cost) for n, cost in kept if n >= begin]
    if last[-1][0] - last[0][0] < math.log(1.5):
        return None
    mean_n, mean_cost = (sum(values) / len(last) for values in zip(*last, strict=True))
    return sum((n - mean_n) * (c - mean_cost) for n, c in last) / sum((n - mean_n) ** 2 for n, _ in last)


def fixed(counts: Sequence[float], costs: Sequence[float]) -> tuple[float, float] | None:
    """(a, b) of cost = a + b * n: what a call costs before its first n, and what each n adds. The sum of the squares of
    the relative errors is the least. None for fewer than two sizes."""
    if len(counts) < 2:
        return None
    ones, slopes = [1 / c for c in costs], [n / c for n, c in zip(counts, costs, strict=True)]
    aa, ab, bb = (
        sum(x * y for x, y in zip(p, q, strict=True)) for p, q in ((ones, ones), (ones, slopes), (slopes, slopes))
    )
    a, b, det = sum(ones), sum(slopes), aa * bb - ab * ab
    return (a * bb - b * ab) / det, (aa * b - ab * a) / det

"""How cost grows: time and memory of an op or a network at many sizes, diffkern and its rivals, after a check that they
compute the same. All sizes are timed in turn, round by round, so that they can be compared with one another."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffkern.bench import record
from diffkern.bench.axes import Curve
from diffkern.bench.cliffs import cliffs, exponent, fixed
from diffkern.bench.memory import TIMES, peak_mb
from diffkern.bench.networks import deltas, wrong
from diffkern.bench.rivals import Run, calls, later, rivals
from diffkern.testing import check

OURS = "diffkern"
SECONDS, FEWEST, MOST = 10.0, 3, 15  # of rounds: as many as fit into so many seconds, but no fewer and no more
SHORT = 2e-3  # seconds of a measurement of an op, at least: it is called so many times
SMALL = 1.0  # MB: less is not told apart, and has no cliffs


def measure(
    curve: Curve, dtype: torch.dtype, sizes: Sequence[int], wanted: Sequence[str], rounds: int | None, folder: Path,
    done: Callable[[float], object],
) -> dict[str, Any]:  # fmt: skip
    """The row of a record: a curve in one dtype. wanted: names of rivals, one form of each. rounds: None for as many as
    SECONDS allow. folder: an empty one, for the weights. done: is told which share of the work was just done."""
    if curve.network is not None:
        curve.network(sizes[0]).make(folder)
    runs: dict[tuple[int, str], Run] = {}
    memory: dict[tuple[int, str], float | None] = {}
    refused: dict[str, str] = {}
    once, whole = 0.0, sum(map(curve.count, sizes))
    for size in sizes:
        found = (_op_calls if curve.network is None else _network_calls)(curve, size, dtype, wanted, folder, refused)
        for name, run in found:
            start = time.perf_counter()
            memory[size, name] = peak_mb(run, "cpu")
            once += (time.perf_counter() - start) / TIMES
            runs[size, name] = run
        done(0.5 * curve.count(size) / whole)
    rounds = rounds or min(MOST, max(FEWEST, int(SECONDS / max(once, SECONDS / MOST))))
    share = 0.5 / max(1, rounds * len(runs))
    seconds = record.interleave(runs, rounds, SHORT if curve.op else 0.0, lambda: done(share))
    variants = list(dict.fromkeys(name for _, name in runs))
    return {
        "curve": curve.name, "axis": curve.axis, "what": curve.what, "size": curve.size, "n": curve.n,
        "power": curve.power, "dtype": _name(dtype), "rounds": rounds,
        "points": [
            {"size": size, "variants": {v: _figures(seconds, memory, size, v) for v in variants if (size, v) in runs}}
            for size in sizes
        ],
        "findings": {v: _findings(curve, v, seconds, memory) for v in variants},
        "refused": refused,
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _form(forms: Mapping[str, Any]) -> dict[str, Any]:
    """The plainest form of a rival, if it has any; the reference only where there is nothing else."""
    ordered = sorted(forms, key=lambda name: (name.startswith("reference"), name.count(",")))
    return {name: forms[name] for name in ordered[:1]}


def _op_calls(
    curve: Curve, size: int, dtype: torch.dtype, wanted: Sequence[str], folder: Path, refused: dict[str, str]
) -> Iterator[tuple[str, Run]]:
    """The op itself, if it is right, and its rivals: each has run once."""
    assert curve.op is not None
    assert curve.args is not None
    op = curve.op
    args = op.bind(*curve.args(size, dtype))
    try:
        check(op, op.choose(args).name, args)
    except AssertionError as error:
        refused[f"{size}, {OURS}"] = str(error)
    else:
        yield OURS, _run_once(lambda: op(*args))
    for name in wanted:
        forms = calls(op, args, "cpu", [name])
        composed = next((b for b in op.backends if b.name == "torch"), None)
        if set(forms) == {"reference"} and composed is not None:  # what one would write is a backend of the op
            forms = {"torch": later(composed)}
        for form, bind in _form(forms).items():
            try:
                run = _run_once(bind(*args))
            except (RuntimeError, NotImplementedError) as error:
                refused[f"{size}, {form}"] = str(error)
            else:
                yield form, run


def _run_once(run: Run) -> Run:
    """The same call, which has packed and compiled."""
    run()
    return run


def _network_calls(
    curve: Curve, size: int, dtype: torch.dtype, wanted: Sequence[str], folder: Path, refused: dict[str, str]
) -> Iterator[tuple[str, Run]]:
    """diffkern's network and its rivals, those whose result is that of diffusers in float32: each has run once."""
    assert curve.network is not None
    network = curve.network(size)
    expected = rivals()["diffusers"].networks["diffusers"](network, folder, torch.float32)()
    makers = {OURS: network.ours}
    for name in wanted:
        for form, make in _form(rivals()[name].networks).items():
            makers[form] = functools.partial(make, network)
    for name, make in makers.items():
        run = make(folder, dtype)
        if reason := wrong(deltas(run(), expected), _name(dtype)):
            refused[f"{size}, {name}"] = reason
        else:
            yield name, run


def _figures(seconds: Any, memory: Any, size: int, variant: str) -> dict[str, Any]:
    found: dict[str, Any] = {"us": record.spread([1e6 * s for s in seconds[size, variant]])}
    if memory[size, variant] is not None:
        found["MB"] = memory[size, variant]
    if variant != OURS and (size, OURS) in seconds:
        found["diffkern is faster by"] = record.ratio(seconds[size, variant], seconds[size, OURS])
    return found


def _findings(curve: Curve, variant: str, seconds: Any, memory: Any) -> dict[str, Any]:
    """What the curve of a variant says of its time and of its memory, as in cliffs.py. Exponents are over n, and
    without cliffs. Of a linear curve: what a call takes before its first unit, and what each adds."""
    sizes = [size for size, name in seconds if name == variant]
    found = {"time": _finding(curve, {size: seconds[size, variant] for size in sizes})}
    if curve.linear:
        median = [1e6 * record.spread(seconds[size, variant])["median"] for size in sizes]
        if (parts := fixed(list(map(curve.count, sizes)), median)) is not None:
            found["time"] |= {"fixed, us": round(parts[0], 3), "each n, us": round(parts[1], 4)}
    large = [size for size in sizes if (memory[size, variant] or 0) >= SMALL]
    if large:
        found["memory"] = _finding(curve, {size: [float(memory[size, variant])] for size in large})
    return found


def _finding(curve: Curve, costs: dict[int, list[float]]) -> dict[str, Any]:
    steep = cliffs(list(costs), list(costs.values()))
    counts = list(map(curve.count, costs))
    medians = [record.spread(values)["median"] for values in costs.values()]
    grows = exponent(counts, medians, {curve.count(cliff.size) for cliff in steep})
    return {"exponent": None if grows is None else round(grows, 3), "cliffs": [cliff._asdict() for cliff in steep]}


class Found(NamedTuple):
    """A cliff of a row: whose it is, and of what, time or memory."""

    variant: str
    what: str
    size: int
    times: float


def cliffs_of(row: dict[str, Any]) -> list[Found]:
    """The cliffs of a row of a record."""
    return [
        Found(variant, what, cliff["size"], cliff["times"])
        for variant, findings in row["findings"].items()
        for what, finding in findings.items()
        for cliff in finding["cliffs"]
    ]


def duration(us: float) -> str:
    """Microseconds in the unit that suits them, to three digits."""
    return _in_units(us, ((1e6, "s"), (1e3, "ms"), (1.0, "us"), (1e-3, "ns")))


def volume(mb: float) -> str:
    """MB, of 10^6 bytes, in the unit that suits them, to three digits."""
    return _in_units(mb, ((1e3, "GB"), (1.0, "MB"), (1e-3, "kB"), (1e-6, "B")))


def _in_units(value: float, units: Sequence[tuple[float, str]]) -> str:
    size, name = next((unit for unit in units if value >= unit[0]), units[-1])
    return f"{value / size:.3g} {name}"

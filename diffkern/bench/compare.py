"""Two records of timings, or two folders of them, against each other: what got faster, what got slower, and what says
nothing because it is within the noise of the measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffkern import files
from diffkern.bench.record import spread as spread_of

CEILINGS = ("matmul", "copy")
"""Variants of an op that say what the machine can do, and nothing of the op: that which is nearer comes first."""
Rows = Iterator[tuple[tuple[str, ...], dict[str, float]]]  # of a record: what was timed, and its spread


@dataclass(frozen=True)
class Timing:
    """What a call took: the median over the rounds, with the 20th and the 80th percentile as its noise."""

    median: float
    p20: float
    p80: float
    unit: str

    def __post_init__(self) -> None:
        if not 0 < self.p20 <= self.median <= self.p80 < math.inf:
            raise ValueError(f"{self.median}, from {self.p20} to {self.p80}, is no time")

    def __str__(self) -> str:
        median, p20, p80 = (f"{t:.0f}" if t >= 1000 else f"{t:.4g}" for t in (self.median, self.p20, self.p80))
        return f"{median} {self.unit} ({p20} to {p80})"


@dataclass(frozen=True)
class Change:
    """One thing that both records timed. moved: how many times as long its ceiling takes after as before, by the
    medians: what the machine itself did, where the records say so."""

    name: str
    before: Timing
    after: Timing
    moved: float = 1.0

    @property
    def percent(self) -> float:
        """How much longer it takes, by the medians; less than 0: it takes less time."""
        return 100 * (self.after.median / self.before.median - 1)

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" where the intervals from p20 to p80 have no point in common, as measured and also on a
        machine that had not moved, else "noise"."""
        for word, beyond in (("slower", self._slower), ("faster", self._faster)):
            if beyond(1.0) and beyond(self.moved):
                return word
        return "noise"

    def _slower(self, moved: float) -> bool:
        return self.after.p20 / moved > self.before.p80

    def _faster(self, moved: float) -> bool:
        return self.after.p80 / moved < self.before.p20

    def regresses(self, percent: float) -> bool:
        """Whether it is slower beyond noise, and by more than so many percent, the machine's own left out."""
        own = self.after.median / max(1.0, self.moved) / self.before.median - 1
        return self.verdict == "slower" and 100 * own > percent


@dataclass(frozen=True)
class Record:
    """A file of timings, as a benchmark wrote it."""

    kind: str
    machine: dict[str, Any]
    what: str  # the sizes behind the names, where the record says them
    timings: dict[str, Timing]
    ceilings: dict[str, dict[str, Timing]]  # of a timing, by its name: what else was timed beside it


@dataclass
class Comparison:
    """Of two records or more."""

    changes: list[Change] = field(default_factory=list)
    only_before: list[str] = field(default_factory=list)
    only_after: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)  # of the machines and what runs on them
    left_out: list[str] = field(default_factory=list)  # files that are no timings
    moved: dict[str, list[float]] = field(default_factory=dict)  # how many times as long each kind of ceiling takes

    def add(self, before: Record, after: Record) -> None:
        a, b = before.timings, after.timings
        for name in a:
            if name in b:
                moved = _moved(before.ceilings.get(name, {}), after.ceilings.get(name, {}))
                self.changes.append(Change(name, a[name], b[name], next(iter(moved.values()), 1.0)))
                for ceiling, times in moved.items():
                    self.moved.setdefault(ceiling, []).append(times)
        self.only_before += [name for name in a if name not in b]
        self.only_after += [name for name in b if name not in a]
        self.differences += [d for d in _differences(before, after) if d not in self.differences]


def _moved(before: dict[str, Timing], after: dict[str, Timing]) -> dict[str, float]:
    """How many times as long the ceilings take that both have; the one first that is nearer to what was timed."""
    return {name: after[name].median / before[name].median for name in CEILINGS if name in before and name in after}


def _ops(results: Any) -> Rows:
    for row in results:
        for variant, figures in row["times"].items():
            yield (row["op"], row["sample"], row["dtype"], variant), figures["us"]


def _schedulers(results: Any) -> Rows:
    for row in results:
        sample = " x ".join(str(size) for size in row["sample"])
        for variant, spread in row["us a step"].items():
            yield (row["scheduler"], sample, row["dtype"], variant), spread


def _networks(results: Any) -> Rows:
    for variant, figures in results["variants"].items():
        yield (results["network"], results["dtype"], variant), figures["ms"]


def _bounds(results: Any) -> Rows:
    for variant, figures in results["variants"].items():
        yield ("bound", results["dtype"], variant), figures["ms a pair"]


def _starts(results: Any) -> Rows:
    for variant, figures in results["variants"].items():
        for kind in ("cold", "warm"):
            if kind in figures:
                yield (results["first picture"], results["dtype"], kind, variant), figures[kind]


def _curves(results: Any) -> Rows:
    for row in results:
        for point in row["points"]:
            for variant, figures in point["variants"].items():
                yield (row["curve"], f"{point['size']} {row['size']}", row["dtype"], variant), figures["us"]


def _datasets(results: Any) -> Rows:
    for row in results["growth"]:
        yield (results["model"], f"{row['n']} pictures", "a picture"), row["ms_per_picture"]


def _whole(results: Any) -> Rows:
    milliseconds = [1000 / speed for speed in results["pictures_per_second_by_tenth"]]
    yield (results["model"], f"a job of {results['whole']} pictures", "a picture"), spread_of(milliseconds)


KINDS: dict[str, tuple[str, str, Callable[[Any], Rows]]] = {
    "ops": ("op", "us", _ops),
    "schedulers": ("scheduler", "us", _schedulers),
    "end_to_end": ("network", "ms", _networks),
    "vlb": ("timesteps", "ms", _bounds),
    "cold_start": ("first picture", "s", _starts),
    "curves": ("curve", "us", _curves),
    "dataset": ("growth", "ms", _datasets),
    "dataset-whole": ("pictures_per_second_by_tenth", "ms", _whole),
}
"""Kinds of records, as their files are named: the key that tells one from the others, the unit, and what is in it."""


def kind_of(results: Any) -> str | None:
    """None for what is no record of timings."""
    first = results[0] if isinstance(results, list) and results else results
    return next((kind for kind, (key, *_) in KINDS.items() if isinstance(first, dict) and key in first), None)


def load(path: Path) -> Record | None:
    """The record in a file; None if it is a record, but not of timings. Raises ValueError, saying why, for a file that
    is no record."""
    found = files.read_json(path)
    if not _is_record(found):
        raise ValueError(f"{path} is not a record of a benchmark: it has no machine and results")
    results = found["results"]
    if (kind := kind_of(results)) is None:
        return None
    _, unit, rows = KINDS[kind]
    timings: dict[str, Timing] = {}
    ceilings: dict[tuple[str, ...], dict[str, Timing]] = {}
    beside: dict[str, dict[str, Timing]] = {}
    names: set[str] = set()
    try:
        for words, spread in rows(results):
            name, (*row, variant) = ", ".join(words), words
            if name in names:
                raise ValueError(f"{name} is in it twice")
            names.add(name)
            timing = Timing(spread["median"], spread["p20"], spread["p80"], unit)
            if kind == "ops" and variant in CEILINGS:
                ceilings.setdefault(tuple(row), {})[variant] = timing
            else:
                timings[name] = timing
                beside[name] = ceilings.setdefault(tuple(row), {})
    except KeyError as e:
        raise ValueError(f"{path} is not a record of {kind}: it lacks {e}") from None
    except (TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{path} is not a record of {kind}: {e}") from None
    what = results.get("what", "") if isinstance(results, dict) else ""
    return Record(kind, found["machine"], what, timings, beside)


def _is_record(found: Any) -> bool:
    machine = found.get("machine") if isinstance(found, dict) else None
    return (
        isinstance(machine, dict)
        and all(isinstance(machine.get(facts, {}), dict) for facts in ("devices", "versions"))
        and "results" in found
    )


def compare(before: Path, after: Path) -> Comparison:
    """Of two files, or of the files of the same name in two folders. Raises ValueError if there is nothing to
    compare."""
    for path in (before, after):
        if not path.exists():
            raise ValueError(f"there is no {path}")
    if before.is_dir() != after.is_dir():
        folder, file = (before, after) if before.is_dir() else (after, before)
        raise ValueError(f"{folder} is a folder and {file} is a file: give two records, or two folders of records")
    found = Comparison()
    if before.is_dir():
        _compare_folders(found, before, after)
    else:
        a, b = load(before), load(after)
        for path, record in ((before, a), (after, b)):
            if record is None:
                raise ValueError(f"{path} is not a record of timings: those are of {', '.join(KINDS)}")
        _add(found, a, b, before, after)
    if not found.changes:
        raise ValueError(f"nothing was timed in both of {before} and {after}")
    return found


def _compare_folders(found: Comparison, before: Path, after: Path) -> None:
    names = [sorted(path.name for path in folder.glob("*.json")) for folder in (before, after)]
    for folder, there in zip((before, after), names, strict=True):
        if not there:
            raise ValueError(f"{folder} has no records in it: give a folder of .json files, that of one machine")
    for name in names[0]:
        if name not in names[1]:
            found.only_before.append(name)
            continue
        a, b = load(before / name), load(after / name)
        if a is None and b is None:
            found.left_out.append(name)
        else:
            _add(found, a, b, before / name, after / name)
    found.only_after += [name for name in names[1] if name not in names[0]]


def _add(found: Comparison, a: Record | None, b: Record | None, before: Path, after: Path) -> None:
    kinds = [record.kind if record else "something else" for record in (a, b)]
    if a is None or b is None or a.kind != b.kind:
        raise ValueError(f"{before} is a record of {kinds[0]} and {after} of {kinds[1]}: give two of the same kind")
    found.add(a, b)


def _differences(before: Record, after: Record) -> Iterator[str]:
    """What makes two records hard to compare, in words. A fact that only one of them states is no difference, but a
    device that only one of them has is."""
    devices = [record.machine.get("devices", {}) for record in (before, after)]
    a, b = (
        {"threads": record.machine.get("threads"), **record.machine.get("versions", {}), "the work": record.what}
        for record in (before, after)
    )
    for name in {**devices[0], **devices[1]}:
        a[name], b[name] = (found.get(name) for found in devices)
    for name, value in a.items():
        if name in b and b[name] != value:
            yield f"{name} {value or 'none'} and {b[name] or 'none'}"

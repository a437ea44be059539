"""The records that a report is made of, and what is said of all of them alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from diffkern import files
from diffkern.bench import compare

Record = dict[str, Any]
"""What a benchmark wrote, "machine" and "results", and its place in the folder, "file": nvidia-h200/ops-linear.json"""

NAMELESS = re.compile(r"^torch uses ")  # how a CPU's instructions are said where its own are not known


@dataclass(frozen=True)
class Standing:
    """How diffkern stands in a piece of work against its fastest rival. ours, rival: what they are and the time that
    they take; times: how many times as fast diffkern is; lost: the rival is faster beyond noise."""

    machine: str
    work: str
    ours: str
    rival: str
    times: float
    lost: bool


def load(folder: Path) -> list[Record]:
    """All records in a folder: of one machine, or a folder for each, as the benchmarks write them. Raises ValueError,
    saying why, for a folder or file that is none."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} of records")
    paths = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    if not paths:
        raise ValueError(f"{folder} has no records in it: give the folder that benchmarks write to")
    found = []
    for path in paths:
        compare.load(path)  # raises if it is no record, or times nothing that can be compared
        found.append({**files.read_json(path), "file": path.relative_to(folder).as_posix()})
    return found


def named(records: Iterable[Record], pattern: str) -> list[Record]:
    """Those whose file is named like that, without .json: "ops-*"."""
    return [record for record in records if fnmatch(PurePosixPath(record["file"]).stem, pattern)]


def device(machine: dict[str, Any]) -> str:
    """The GPU of a machine, or else its CPU with the threads that were used."""
    devices = machine["devices"]
    name, _, instructions = devices["cpu"].rsplit(", ", 2)
    cpu = f"{name} with {NAMELESS.sub('', instructions)}, {machine['threads']} threads"
    return next((str(found) for kind, found in devices.items() if kind != "cpu"), cpu)


def where(machine: dict[str, Any]) -> str:
    """The device and what ran on it."""
    return f"{device(machine)}, torch {machine['versions']['torch']}"


def by_machine(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each machine, in their order."""
    machines: dict[str, list[Record]] = {}
    for record in records:
        machines.setdefault(where(record["machine"]), []).append(record)
    return machines


def foremost(records: Iterable[Record]) -> list[Record]:
    """Those of the CPU and of the GPU that have the most: a README has no room for more."""
    records = list(records)
    count = Counter(device(record["machine"]) for record in records)
    kinds: dict[bool, str] = {}  # of a GPU or not; of equals the first
    for record in records:
        gpu, name = len(record["machine"]["devices"]) > 1, device(record["machine"])
        if gpu not in kinds or count[name] > count[kinds[gpu]]:
            kinds[gpu] = name
    return [record for record in records if device(record["machine"]) in kinds.values()]


def digits(value: float) -> str:
    """No more digits than are measured."""
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def spread(value: dict[str, float], unit: str = "") -> str:
    """A time with its 20th and 80th percentile."""
    of = f" {unit}" if unit else ""
    return f"{digits(value['median'])}{of} ({digits(value['p20'])} to {digits(value['p80'])})"


def times(ratio: dict[str, float]) -> str:
    """How many times, with the 20th and the 80th percentile."""
    return f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def span(values: Sequence[float], form: str = ".2f") -> str:
    """From the least to the most; one figure if it is the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, each cell on one line and in its column whatever is in it."""

    def line(cells: Sequence[str]) -> str:
        words = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        return "|" + "|".join(f" {cell} " if cell else " " for cell in words) + "|"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])

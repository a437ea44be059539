"""How cost grows with the size: tables of every curve, and a picture of them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffkern.bench.cliffs import LIMIT
from diffkern.bench.curves import OURS, cliffs_of, duration, volume
from diffkern.bench.curves_plot import Line, figure, lines
from diffkern.bench.report.records import Record, by_machine, foremost, named, span, spread, table, times

__all__ = ["ABOUT", "FILE", "NAME", "data", "details", "figure"]

NAME = "curves-*"
FILE = "curves.png"
ABOUT = (
    "How cost grows: time and memory over the size, shared out over what there is more of. A line that falls and then "
    "stays level is linear, one that rises is worse. The band is noise; a ring is around a size that costs more than "
    "the sizes beside it predict."
)


def _summary(records: list[Record]) -> str:
    """A line a curve and dtype."""
    return (
        "How cost grows at the end of each curve: ~ n^1 is linear, ~ n^2 quadratic. A cliff is a size that takes more "
        f"than {LIMIT:g} times what the sizes beside it predict:\n\n"
        + table(
            ["", "n", "diffkern's time", "its memory", "its cliffs", "rival", "its cliffs", "diffkern is faster by"],
            (line for record in records for row in record["results"] for line in _lines(row)),
        )
    )


def _lines(row: dict[str, Any]) -> Iterator[list[str]]:
    """A line for each rival; one without any if there is none."""
    if OURS not in row["findings"]:
        return
    for rival in [name for name in row["findings"] if name != OURS] or [""]:
        faster = [
            point["variants"][rival]["diffkern is faster by"]["median"]
            for point in row["points"]
            if "diffkern is faster by" in point["variants"].get(rival, {})
        ]
        yield [
            f"{row['curve']}, {row['dtype']}", f"{row['n']}", _grows(row, OURS, "time"), _grows(row, OURS, "memory"),
            _cliffs(row, OURS), rival, _cliffs(row, rival), span(faster) if faster else "-",
        ]  # fmt: skip


def _grows(row: dict[str, Any], variant: str, what: str) -> str:
    power = row["findings"][variant].get(what, {}).get("exponent")
    return "-" if power is None else f"~ n^{power:.2f}"


def _cliffs(row: dict[str, Any], variant: str) -> str:
    """Where they are, of time and of memory, and how high the highest is."""
    words = []
    for what in ("time", "memory"):
        if found := [cliff for cliff in cliffs_of(row) if (cliff.variant, cliff.what) == (variant, what)]:
            sizes, highest = ", ".join(str(cliff.size) for cliff in found), max(cliff.times for cliff in found)
            words.append(f"{what} at {sizes}: {'up to ' if len(found) > 1 else ''}{highest:.2f} times")
    return "; ".join(words) or "none"


def details(records: list[Record]) -> str:
    """Machine by machine a line a curve, then every size of every curve."""
    parts = []
    for machine, found in by_machine(records).items():
        parts += [f"## How cost grows, {machine}", _summary(found)]
        parts += [_details(row) for record in found for row in record["results"]]
    return "\n\n".join(parts)


def _details(row: dict[str, Any]) -> str:
    variants = list(row["findings"])
    header = [row["size"]]
    for name in variants:
        header += [f"{name}, us (p20 to p80)", "time / n", "memory", *(["faster by"] if name != OURS else [])]
    body = []
    for point in row["points"]:
        line = [f"{point['size']}"]
        for name in variants:
            figures = point["variants"].get(name)
            line += _cells(figures, point["size"] ** row["power"], name) if figures else ["-"] * (3 + (name != OURS))
        body.append([*line, ", ".join(f"{c.variant}: {c.times:.2f} times the {c.what}" for c in cliffs_of(row)
                                      if c.size == point["size"])])  # fmt: skip
    about = f"{row['what']}; n: {row['n']}; {row['rounds']} rounds."
    refused = [f"Not timed: {name}: {reason}." for name, reason in row["refused"].items()]
    return "\n\n".join([f"### {row['curve']}, {row['dtype']}", about, table([*header, "cliffs"], body), *refused])


def _cells(figures: dict[str, Any], n: int, name: str) -> list[str]:
    cells = [spread(figures["us"]), duration(figures["us"]["median"] / n)]
    cells.append(volume(figures["MB"]) if "MB" in figures else "-")
    if name != OURS:
        cells.append(times(figures["diffkern is faster by"]) if "diffkern is faster by" in figures else "-")
    return cells


def data(records: list[Record]) -> list[Line]:
    """What the picture shows: the curves of the foremost machine."""
    return lines(row for record in foremost(named(records, NAME)) for row in record["results"])

"""How long a user waits for the first picture of a process."""

from __future__ import annotations

from diffkern.bench.report.records import Record, spread, table, times, where

NAME = "cold_start"
STARTS = ("cold", "warm")
FASTER = "diffkern is faster by"


def _table(record: Record) -> str:
    r = record["results"]
    rows = [
        [name, *(spread(v[start]) if start in v else "-" for start in STARTS), times(v[FASTER]) if FASTER in v else "-"]
        for name, v in r["variants"].items()
    ]
    header = ["", *(f"{start}, s (p20 to p80)" for start in STARTS), "warm, diffkern is faster by"]
    found = (
        f"{where(record['machine'])}, {r['dtype']}. Seconds from the start of a process until its picture is on disk, "
        f"cold with nothing compiled yet, warm with all of it; {r['what']}:\n\n{table(header, rows)}"
    )
    if parts := ", ".join(f"{part} {seconds['median']:.2g} s" for part, seconds in r["phases"].items()):
        found += f"\n\nWhere diffkern's time goes, warm: {parts}."
    return found


def details(records: list[Record]) -> str:
    """A line for each way to draw it, machine by machine, and what was not timed."""
    refused = [
        f"Not timed on {where(record['machine'])}: {name}: {reason}"
        for record in records
        for name, reason in record["results"]["refused"].items()
    ]
    return "\n\n".join(["## The first picture", *map(_table, records), *refused])

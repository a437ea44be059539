"""How long the full variational bound takes, and what it takes otherwise."""

from __future__ import annotations

from diffkern.bench.report.records import Record, by_machine, table, times

NAME = "vlb-*"
OTHERS = {"plain PyTorch": "plain PyTorch, batched: slower by", "loop": "the usual loop: slower by"}


def _table(machine: str, records: list[Record]) -> str:
    rows = []
    for record in records:
        variants = record["results"]["variants"]
        ms = variants["diffkern"]["ms a pair"]
        slower = [times(variants[name]["diffkern is faster by"]) for name in OTHERS]
        time = f"{ms['median']:.3g} ({ms['p20']:.3g} to {ms['p80']:.3g})"
        rows.append([record["results"]["dtype"], time, *slower])
    heading = f"{machine}; {records[0]['results']['what']}:"
    return f"{heading}\n\n{table(['', 'ms a pair (p20 to p80)', *OTHERS.values()], rows)}"


def details(records: list[Record]) -> str:
    """A line a dtype, machine by machine."""
    return "\n\n".join(["## Bounds", *(_table(machine, found) for machine, found in by_machine(records).items())])

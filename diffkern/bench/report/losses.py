"""Where diffkern loses: every piece of work that a rival does faster."""

from __future__ import annotations

from diffkern.bench.report import networks, ops, schedulers
from diffkern.bench.report.records import Record, Standing, named, table

NAME = "*"
PARTS = (networks, ops, schedulers)
MOST = 5  # rows of a machine in a README


def summary(records: list[Record]) -> str:
    """The worst, machine by machine."""
    return _tables(records, MOST)


def details(records: list[Record]) -> str:
    """All of them."""
    return f"## Where diffkern loses\n\n{_tables(records, None)}"


def _tables(records: list[Record], most: int | None) -> str:
    machines: dict[str, list[Standing]] = {}
    for part in PARTS:
        for standing in part.standings(named(records, part.NAME)):
            machines.setdefault(standing.machine, []).append(standing)
    return "\n\n".join(_table(machine, found, most) for machine, found in machines.items())


def _table(machine: str, found: list[Standing], most: int | None) -> str:
    lost = sorted((s for s in found if s.lost), key=lambda s: s.times)
    faster = f"of {len(found)} networks, workloads and schedulers a rival is faster beyond noise"
    if not lost:
        return f"{machine}: in none {faster}."
    rows = [[s.work, s.ours, s.rival, f"{s.times:.2f}"] for s in lost[:most]]
    shown = "the worst first" if len(rows) == len(lost) else f"the worst {len(rows)} of them"
    header = ["", "diffkern (p20 to p80)", "the fastest rival", "times as fast"]
    return f"{machine}: in {len(lost)} {faster}, {shown}:\n\n{table(header, rows)}"

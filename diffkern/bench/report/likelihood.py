"""What the bundled model says of pictures."""

from __future__ import annotations

from diffkern.bench.report.records import Record, table, where

NAME = "likelihood"
METHODS = {"vlb": "VLB", "vdm": "VDM", "ode": "ODE"}


def summary(records: list[Record]) -> str:
    """Bits per dimension of each set by each method, with the standard error over its pictures."""
    return "\n\n".join(map(_table, records))


def _table(record: Record) -> str:
    rows = {(row["data"], row["method"]): row for row in record["results"]["rows"]}
    sets = list(dict.fromkeys(name for name, _ in rows))
    methods = [method for method in METHODS if any((name, method) in rows for name in sets)]
    each = {m: sum(rows[s, m]["seconds"] for s in sets) / sum(rows[s, m]["pictures"] for s in sets) for m in methods}
    header = ["bits/dim", "pictures", *(f"{METHODS[m]}, {each[m]:.1f} s a picture" for m in methods)]
    return table(header, [
        [name, f"{rows[name, methods[0]]['pictures']}",
         *(f"{rows[name, m]['bits_per_dim']:.3f} ± {rows[name, m]['standard_error']:.3f}" for m in methods)]
        for name in sets
    ])  # fmt: skip


def details(records: list[Record]) -> str:
    """The same, with the command."""
    parts = (
        f"### Likelihood, {where(record['machine'])}\n\n`{record['results']['command']}`\n\n{_table(record)}"
        for record in records
    )
    return "\n\n".join(["## Likelihood", *parts])

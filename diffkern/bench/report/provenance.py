"""Where the figures come from: how each record was made, and on what."""

from __future__ import annotations

from typing import Any

from diffkern.bench.report.records import Record, device, table

NAME = "*"


def summary(records: list[Record]) -> str:
    """Nothing: a README says where the records are."""
    return ""


def details(records: list[Record]) -> str:
    """A line a record, in a table for all that were made with the same versions on the same device."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_facts(record["machine"]), []).append(record)
    parts = []
    for facts, found in groups.items():
        rows = [
            [record["file"], m.get("date", "-"), m.get("commit") or "-", f"`{m['command']}`" if "command" in m else "-"]
            for record in found
            for m in (record["machine"],)
        ]
        parts += [facts, table(["record", "date", "commit", "command"], rows)]
    return "\n\n".join(["## Records", *parts])


def _facts(machine: dict[str, Any]) -> str:
    devices = "; ".join(f"{kind}: {name}" for kind, name in machine["devices"].items())
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{device(machine)}. {devices}; {versions}."

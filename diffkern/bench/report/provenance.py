"""Where the figures come from: how each record was made, and on what."""

from __future__ import annotations

import re
from typing import Any

from diffkern.bench.report.records import Record, device, table

NAME = "*"
PLACE = re.compile(r" \(/[^)]*\)")


def details(records: list[Record]) -> str:
    """A line a record, in a table for all that were made with the same versions on the same device."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_facts(record["machine"]), []).append(record)
    parts = []
    for facts, found in groups.items():
        rows = [
            [record["file"], record["machine"].get("date", "-"), *(_code(record, key) for key in ("commit", "command"))]
            for record in found
        ]
        parts += [facts, table(["record", "date", "commit", "command"], rows)]
    return "\n\n".join(["## Records", *parts])


def _code(record: Record, key: str) -> str:
    return f"`{record['machine'][key]}`" if record["machine"].get(key) else "-"


def _facts(machine: dict[str, Any]) -> str:
    devices = "; ".join(f"{kind}: {name}" for kind, name in machine["devices"].items())
    # without the places of programs, which are nobody's but the user's
    versions = ", ".join(f"{name} {PLACE.sub('', str(version))}" for name, version in machine["versions"].items())
    return f"{device(machine)}. {devices}; {versions}."

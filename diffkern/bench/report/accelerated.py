"""diffusers' own networks after `diffkern.accelerate`."""

from __future__ import annotations

from diffkern.bench.report.networks import ACCELERATED, LOADED, OURS, on_gpu, rival
from diffkern.bench.report.records import Record, by_machine, table

NAME = "end_to_end-*"
BOTH = f"{ACCELERATED}, torch.compile"


def details(records: list[Record]) -> str:
    """A line a network and dtype, machine by machine; those of a GPU are in the table of its networks."""
    timed = [r for r in records if {LOADED, ACCELERATED} <= set(r["results"]["variants"]) and not on_gpu(r)]
    tables = [_table(machine, found) for machine, found in by_machine(timed).items()]
    return "\n\n".join(["## diffusers, accelerated", *tables]) if tables else ""


def _table(machine: str, records: list[Record]) -> str:
    rows = []
    for record in records:
        r = record["results"]
        ms = {name: figures["ms"]["median"] for name, figures in r["variants"].items()}
        fast = ms[ACCELERATED]
        compiled = min((t for name, t in ms.items() if rival(name) == "torch.compile"), default=None)
        rows.append([
            f"{r['network']}, {r['dtype']}", f"{ms[LOADED]:.0f} ms", f"{fast:.0f} ms",
            f"{ms[BOTH]:.0f} ms" if BOTH in ms else "-", f"{ms[LOADED] / fast:.2f}",
            "-" if compiled is None else f"{compiled / fast:.2f}", f"{ms[OURS] / fast:.2f}",
        ])  # fmt: skip
    header = ["", "diffusers", "accelerated", "compiled too", "of diffusers", "of torch.compile", "of diffkern's own"]
    return (
        f"{machine}. diffusers as it is loaded, after `diffkern.accelerate`, and under torch.compile too; accelerated "
        "is how many times as fast as its rivals and as diffkern's own model:\n\n" + table(header, rows)
    )

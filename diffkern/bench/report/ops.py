"""Ops on the workloads of real networks, against every rival and against what the machine can do at best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from diffkern.bench.compare import Change, Timing
from diffkern.bench.report.records import Record, Standing, by_machine, span, spread, table

NAME = "ops-*"
KERNELS = ("cuda", "triton", "cpu")
CEILINGS = ("copy", "matmul")


@dataclass(frozen=True)
class Row:
    """An op on a workload: the backend that it takes, its figures, the fastest rival's name and time, and how many
    times as fast it is; no rival: "" and NaN."""

    op: str
    sample: str
    dtype: str
    backend: str
    figures: dict[str, Any]
    rival: str
    rival_us: dict[str, float]
    faster: float


def row_of(result: dict[str, Any]) -> Row | None:
    """None if no kernel of diffkern was timed."""
    timed = result["times"]
    # Which backend the op takes, be it PyTorch's own; older records of a CPU do not say it.
    backend = result.get("chosen") or next((name for name in KERNELS if name in timed), "")
    if backend not in timed:
        return None
    ours, rivals = timed[backend], [name for name in timed if name not in (*KERNELS, *CEILINGS, backend)]
    rival = min(rivals, key=lambda name: timed[name]["us"]["median"], default="")
    us = timed[rival]["us"] if rival else dict.fromkeys(("median", "p20", "p80"), float("nan"))
    faster = us["median"] / ours["us"]["median"]
    return Row(result["op"], result["sample"], result["dtype"], backend, ours, rival, us, faster)


def rows_of(records: Iterable[Record]) -> list[Row]:
    found = (row_of(result) for record in records for result in record["results"])
    return [row for row in found if row is not None]


def standings(records: Iterable[Record]) -> list[Standing]:
    """Against the fastest rival of each workload. It is faster if the intervals from p20 to p80 have no point in
    common."""
    found = []
    for machine, chosen in by_machine(records).items():
        for row in rows_of(chosen):
            if row.rival:
                us = row.figures["us"]
                change = Change(row.op, Timing(unit="us", **us), Timing(unit="us", **row.rival_us))
                found.append(Standing(
                    machine, f"{row.op}, {row.sample}, {row.dtype}", f"{row.backend}, {spread(us, 'us')}",
                    f"{row.rival}, {spread(row.rival_us, 'us')}", row.faster,
                    change.verdict == "faster",
                ))  # fmt: skip
    return found


def _ceiling(figures: dict[str, Any]) -> tuple[str, float, str]:
    """What a kernel is measured by: a copy, or a product if it multiplies; on a GPU, the longer of the two times that
    it would take at the ceilings of the device."""
    if "of floor" in figures:
        rate = f"{figures['GFLOP/s'] / 1e3:.0f} TFLOP/s" if "of matmul" in figures else f"{figures['GB/s']:.0f} GB/s"
        return rate, 100 * figures["of floor"], "of the floor"
    if "of matmul" in figures:
        return f"{figures['GFLOP/s']:.0f} GFLOP/s", 100 * figures["of matmul"], "of matmul"
    return f"{figures['GB/s']:.1f} GB/s", 100 * figures["of copy"], "of copy"


def _ceilings(records: Iterable[Record]) -> str:
    """What the floor of a GPU's ops is counted from."""
    found = next((result["ceilings"] for r in records for result in r["results"] if "ceilings" in result), None)
    if found is None:
        return ""
    return f" (a copy {found['GB/s']:.0f} GB/s, read and written; a bfloat16 product {found['TFLOP/s']:.0f} TFLOP/s)"


def _summary(machine: str, records: list[Record]) -> str:
    """A line an op: the least and the most over its workloads."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows_of(records):
        groups.setdefault(row.op, {}).setdefault(row.dtype, []).append(row)
    dtypes = list(dict.fromkeys(dtype for found in groups.values() for dtype in found))
    header = ["op", *(words for dtype in dtypes for words in (f"{dtype}: faster by", "share of the ceiling"))]
    rows = [[op, *(cell for dtype in dtypes for cell in _cells(found.get(dtype)))] for op, found in groups.items()]
    return f"{machine}{_ceilings(records)}:\n\n{table(header, rows)}"


def _cells(rows: list[Row] | None) -> tuple[str, str]:
    if not rows:
        return "-", "-"
    shares, faster = [_ceiling(row.figures) for row in rows], [row.faster for row in rows if row.rival]
    return span(faster) if faster else "-", f"{span([share for _, share, _ in shares], '.0f')} % {shares[0][2]}"


def details(records: list[Record]) -> str:
    """A line an op, machine by machine, then every workload of every op."""
    parts = (make(machine, found) for make in (_summary, _details) for machine, found in by_machine(records).items())
    return "\n\n".join(["## Ops", *parts])


def _details(machine: str, records: list[Record]) -> str:
    said = (
        "The rival is the fastest of the reference, what one would write in PyTorch with its own generator, "
        "torch.compile of both, and what libraries have. The ceiling is a clone of as many bytes, or for products a "
        "matmul of as many operations; convolutions by Winograd's way do fewer than are counted."
    )
    if ceilings := _ceilings(records):
        said += f" On this GPU it is the floor{ceilings}; calls are replayed from a CUDA graph."
    rows = []
    for row in rows_of(records):
        rate, share, _ = _ceiling(row.figures)
        peak = f"{row.figures['peak MB']:.3g} MB" if "peak MB" in row.figures else "-"
        rows.append([
            row.op, row.sample, row.dtype, row.backend, spread(row.figures["us"]), rate, f"{share:.0f} %", peak,
            row.rival or "-", f"{row.faster:.2f}" if row.rival else "-",
        ])  # fmt: skip
    header = ["op", "workload", "dtype", "backend", "us (p20 to p80)", "rate", "of the ceiling", "peak memory", "rival",
              "faster by"]  # fmt: skip
    return "\n\n".join([f"### Ops, {machine}", said, table(header, rows), *_refused(records)])


def _refused(records: list[Record]) -> list[str]:
    """Why some rivals are missing, each reason once for an op."""
    results = [result for record in records for result in record["results"]]
    workloads = Counter(result["op"] for result in results)
    found = Counter((result["op"], *pair) for result in results for pair in result.get("refused", {}).items())
    return [
        f"Not timed: {name} in {count} of {workloads[op]} workloads of {op}: {reason}"
        for (op, name, reason), count in found.items()
    ]

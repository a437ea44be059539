"""roofline.png: what ops reach of what the machine can do, by how many operations they do for each byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffkern import plots
from diffkern.bench.report.ops import NAME, row_of
from diffkern.bench.report.records import Record, by_machine, digits, named

FILE = "roofline.png"
ABOUT = (
    "Operations for each byte that must be moved, and operations a second. A mark is a workload of an op, and the tick "
    "on its line its own ceiling, measured in the same run: a copy of as many bytes, or for a product a matmul of as "
    "many operations, if that is less. Dashed: the fastest copy, on a CPU one within its caches, and that of the most "
    "bytes. Convolutions above the matmul do fewer operations than are counted (Winograd)."
)
MARKS = "osD^vP"


@dataclass(frozen=True)
class Point:
    """A workload of an op. intensity: operations a byte; reached, ceiling: GFLOP/s; copy: GB/s of as many bytes."""

    machine: str
    dtype: str
    op: str
    intensity: float
    reached: float
    ceiling: float
    bytes: int
    copy: float
    matmul: float | None  # GFLOP/s


def data(records: list[Record]) -> list[Point]:
    """All that is drawn: what was recorded with its operations."""
    found = []
    for machine, chosen in by_machine(named(records, NAME)).items():
        for result in (result for record in chosen for result in record["results"]):
            row, flops = row_of(result), result.get("flops")
            if row is None or not flops:
                continue
            copy = result["times"]["copy"]["GB/s"]
            matmul = _matmul(result)
            intensity = flops / result["bytes"]
            ceiling = min(intensity * copy, matmul or float("inf"))
            reached = flops / row.figures["us"]["median"] / 1e3
            found.append(Point(machine, row.dtype, row.op, intensity, reached, ceiling, result["bytes"], copy, matmul))
    return found


def _matmul(result: dict[str, Any]) -> float | None:
    """GFLOP/s of the product that the ops which multiply are measured by."""
    own = result["times"].get("matmul")
    if own:
        return float(own["GFLOP/s"])
    multiplies = any("of matmul" in figures for figures in result["times"].values())
    return 1e3 * result["ceilings"]["TFLOP/s"] if multiplies and "ceilings" in result else None


def ops_of(points: list[Point]) -> list[str]:
    """All ops there are, in the order of the legend."""
    return sorted({point.op for point in points})


def figure(points: list[Point]) -> Any:
    """A panel a machine and dtype. In an SVG the marks of the first op are in groups named op0-..., and so on."""
    panels = list(dict.fromkeys((point.machine, point.dtype) for point in points))
    # the eleventh has the first one's colour and another mark
    looks = {op: (f"C{i % 10}", MARKS[(i + i // 10) % len(MARKS)]) for i, op in enumerate(ops_of(points))}
    rows = len(panels) // 2 + 1  # with the legend
    drawn = plots.figure(9, 3.8 * rows)
    axes = list(drawn.subplots(rows, 2, squeeze=False).flat)
    for panel, (machine, dtype) in zip(axes, panels, strict=False):
        chosen = [point for point in points if (point.machine, point.dtype) == (machine, dtype)]
        _roofs(panel, chosen)
        for i, op in enumerate(looks):
            if marked := [point for point in chosen if point.op == op]:
                for k, artist in enumerate(_marks(panel, marked, *looks[op])):
                    artist.set_gid(f"op{i}-{axes.index(panel)}-{k}")
        panel.set_title(f"{machine.replace(', torch', chr(10) + 'torch')}, {dtype}", fontsize=10)
        panel.set(xlabel="operations a byte", ylabel="GFLOP/s")
        plots.grid(panel)
    for empty in axes[len(panels) :]:
        empty.axis("off")
    _legend(axes[len(panels)], looks)
    return drawn


def _roofs(axes: Any, points: list[Point]) -> None:
    """The fastest copy, that of the most bytes, and the fastest product."""
    axes.set(xscale="log", yscale="log")
    left, right = min(p.intensity for p in points) / 1.6, max(p.intensity for p in points) * 1.6
    axes.set_xlim(left, right)
    copies = dict.fromkeys((max(points, key=lambda p: p.copy), max(points, key=lambda p: p.bytes)))
    said = [f"copy of {point.bytes / 1e6:.3g} MB: {digits(point.copy)} GB/s" for point in copies]
    roof = max((p.matmul for p in points if p.matmul), default=None)
    for point in copies:
        end = right if roof is None else min(right, roof / point.copy)
        axes.plot([left, end], [left * point.copy, end * point.copy], "--", color="#666", linewidth=1)
    if roof is not None:
        axes.axhline(roof, color="#666", linewidth=1)
        said.append(f"matmul: {roof / 1e3:.0f} TFLOP/s" if roof > 1e4 else f"matmul: {roof:.0f} GFLOP/s")
    axes.text(0.97, 0.03, "\n".join(said), transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5)


def _marks(axes: Any, points: list[Point], color: str, mark: str) -> list[Any]:
    """What is reached, and the ticks of what could be."""
    x, reached, ceilings = ([getattr(p, name) for p in points] for name in ("intensity", "reached", "ceiling"))
    return [
        axes.vlines(x, reached, ceilings, color=color, alpha=0.3, linewidth=1),
        *axes.plot(x, ceilings, "_", color=color, alpha=0.7, markersize=5),
        *axes.plot(x, reached, mark, color=color, markersize=5.5, markeredgecolor="white", markeredgewidth=0.5),
    ]


def _legend(axes: Any, looks: dict[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, (c, m) in looks.items()]
    lines.append(Line2D([], [], color="#666", marker="_", linestyle="", label="the ceiling of a mark"))
    axes.legend(handles=lines, loc="center", frameon=False, fontsize=9)

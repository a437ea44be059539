"""networks.png: how many times as fast diffkern is as each rival, network by network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffkern import plots
from diffkern.bench.report.networks import NAME, forms, on_gpu
from diffkern.bench.report.records import Record, named, where

FILE = "networks.png"
ABOUT = (
    "How many times as fast diffkern is as the fastest form of each rival, on a logarithmic scale: bars up are faster, "
    "bars down slower, filled with red beyond noise. Whiskers from the 20th to the 80th percentile over the rounds."
)
LOSS = "#d62728"
COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C7", "C8", "C9")  # of rivals; the one between is that of losses
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 10)


@dataclass(frozen=True)
class Bar:
    machine: str
    work: str
    rival: str
    median: float
    p20: float
    p80: float


def data(records: list[Record]) -> list[Bar]:
    """All that is drawn, a GPU's first."""
    chosen = sorted(named(records, NAME), key=on_gpu, reverse=True)
    return [
        Bar(where(record["machine"]), work, rival, ratio["median"], ratio["p20"], ratio["p80"])
        for record in chosen
        for work, _, rivals in forms(record)
        for rival, (_, ratio) in rivals.items()
    ]


def figure(bars: list[Bar]) -> Any:
    """A panel a machine."""
    machines = list(dict.fromkeys(bar.machine for bar in bars))
    rivals = dict.fromkeys(bar.rival for bar in bars)
    colors = {rival: COLORS[i % len(COLORS)] for i, rival in enumerate(rivals)}
    drawn = plots.figure(9, 0.5 + 2.9 * len(machines))
    for panel, machine in zip(drawn.subplots(len(machines), squeeze=False).flat, machines, strict=True):
        _panel(panel, machine, [bar for bar in bars if bar.machine == machine], colors)
    _legend(drawn, colors)
    return drawn


def _panel(axes: Any, machine: str, bars: list[Bar], colors: dict[str, str]) -> None:
    works = list(dict.fromkeys(bar.work for bar in bars))
    width = 0.84 / max(sum(bar.work == work for bar in bars) for work in works)
    for place, work in enumerate(works):
        group = sorted((bar for bar in bars if bar.work == work), key=lambda bar: list(colors).index(bar.rival))
        for i, bar in enumerate(group):
            _bar(axes, place + width * (i - (len(group) - 1) / 2), 0.88 * width, bar, colors[bar.rival])
    axes.set_yscale("log")
    low, high = min(0.9, *(bar.p20 for bar in bars)), max(1.2, *(bar.p80 for bar in bars))
    low, high = low / (high / low) ** 0.25, high * (high / low) ** 0.32  # room for the figures
    shown = [tick for tick in TICKS if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)
    axes.set_xticks(range(len(works)), [work.replace(", ", "\n") for work in works])
    axes.set_xlim(-0.6, len(works) - 0.4)
    axes.axhline(1, color="#333", linewidth=1)
    axes.set_title(machine, fontsize=11)
    axes.set_ylabel("times as fast")
    plots.grid(axes, axis="y")


def _bar(axes: Any, x: float, width: float, bar: Bar, color: str) -> None:
    """From 1 to the median, with its whisker, and the figure beyond that."""
    fill = LOSS if bar.p80 < 1 else color
    axes.bar(x, bar.median - 1, width, bottom=1, color=fill, edgecolor=color, linewidth=1.5, alpha=0.85)
    whisker = [[bar.median - bar.p20], [bar.p80 - bar.median]]
    axes.errorbar(x, bar.median, whisker, color="#333", linewidth=0.9, capsize=1.5)
    up = bar.median >= 1
    axes.annotate(
        f"{bar.median:.2f}", (x, bar.p80 if up else bar.p20), (0, 3 if up else -3), textcoords="offset points",
        ha="center", va="bottom" if up else "top", rotation=90, fontsize=8,
    )  # fmt: skip


def _legend(drawn: Any, colors: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    shown = [Patch(color=color, alpha=0.85, label=rival) for rival, color in colors.items()]
    shown.append(Patch(facecolor=LOSS, alpha=0.85, label="slower than the rival of the frame's colour"))
    drawn.legend(handles=shown, loc="outside upper center", ncols=3, frameon=False)

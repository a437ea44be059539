"""Draws how cost grows: time and memory of each n over the size, diffkern against its rivals, cliffs marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkern import files, plots
from diffkern.bench.cliffs import LIMIT
from diffkern.bench.curves import OURS, SMALL, cliffs_of, duration, volume

SUFFIXES = (".png", ".svg", ".pdf")
STYLES: dict[str, Any] = {"float32": "-", "bfloat16": "--"}
COLUMNS = 4  # of panels side by side
SPAN = 5.0  # times, from the bottom of a panel to its top at least: less would make mountains of noise
CLIFF: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgecolor": "crimson",
                         "linestyle": "none"}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What one variant of a curve costs in a dtype: of each size the median, 20th and 80th percentile, shared out over
    n; us, or MB. size, n: what they count."""

    curve: str
    size: str
    n: str
    dtype: str
    variant: str
    what: str
    costs: dict[int, tuple[float, float, float]]
    cliffs: tuple[int, ...]


def check(path: Path) -> None:
    """Raise ValueError if no plot can be drawn or written there, before any work is done for it."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw {path}: give a name that ends in {', '.join(SUFFIXES)}")
    plots.check()
    files.check_writable(path)


def draw(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write the plot of rows of records, whole or not at all."""
    files.replace(path, plots.rendered(figure(lines(rows)), path.suffix[1:].lower()))


def lines(rows: Iterable[dict[str, Any]]) -> list[Line]:
    """What there is to draw of rows of records. Memory that was not measured, or of which there is too little to be
    told apart from none, is left out."""
    found = []
    for row in rows:
        for variant in row["findings"]:
            times: dict[int, tuple[float, float, float]] = {}
            memory: dict[int, tuple[float, float, float]] = {}
            for point in row["points"]:
                if (figures := point["variants"].get(variant)) is not None:
                    size, n, us = point["size"], point["size"] ** row["power"], figures["us"]
                    times[size] = (us["median"] / n, us["p20"] / n, us["p80"] / n)
                    if (mb := figures.get("MB", 0.0)) >= SMALL:
                        memory[size] = (mb / n,) * 3
            for what, costs in (("time", times), ("memory", memory)):
                steep = tuple(c.size for c in cliffs_of(row) if (c.variant, c.what) == (variant, what))
                found.append(
                    Line(row["curve"], row["size"], row["n"], row["dtype"], variant, what, costs, steep)
                )  # fmt: skip
    return found


def figure(drawn: Sequence[Line]) -> Any:
    """Two panels for each curve: time above, memory below."""
    curves = list(dict.fromkeys(line.curve for line in drawn))
    others = [name for name in dict.fromkeys(line.variant for line in drawn) if name != OURS]
    colors = {OURS: "C0", **{name: f"C{1 + i % 9}" for i, name in enumerate(others)}}
    columns = min(COLUMNS, len(curves))
    height = -(-len(curves) // columns)
    sheet = plots.figure(max(7.5, 4.1 * columns), 5.6 * height + 0.6)
    panels = sheet.subplots(2 * height, columns, squeeze=False, height_ratios=(1.7, 1) * height)
    for panel in panels.flat:
        panel.set_visible(False)
    for i, curve in enumerate(curves):
        sizes = [size for line in drawn if line.curve == curve for size in line.costs]
        for j, what in enumerate(("time", "memory")):
            found = [line for line in drawn if (line.curve, line.what) == (curve, what)]
            panel = panels[2 * (i // columns) + j][i % columns]
            panel.set_visible(True)
            _panel(panel, found, colors)
            panel.set_xlim(*_spaced(sizes, 1.0))
    _legend(sheet, colors, dict.fromkeys(line.dtype for line in drawn))
    return sheet


def _panel(axes: Any, drawn: Sequence[Line], colors: dict[str, str]) -> None:
    first = drawn[0]
    for line in drawn:
        _line(axes, line, colors[line.variant])
    # The sizes of all cliffs once, at the top: beside their rings those of two lines would lie upon each other.
    for sizes in _beside(sorted({size for line in drawn if line.costs for size in line.cliffs})):
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "zorder": 5}
        axes.text(sizes[0], 0.98, ", ".join(map(str, sizes)), fontsize=8, color="crimson", **place)
    _scale(axes.xaxis, 2, (1.0,))
    _scale(axes.yaxis, 10, (1.0, 2.0, 5.0))
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.yaxis.set_major_formatter(lambda cost, _: (duration if first.what == "time" else volume)(cost))
    axes.set_ylabel(f"{first.what} / {first.n}", fontsize=9)
    if first.what == "time":
        axes.set_title(first.curve, fontsize=11, fontweight="bold")
    else:
        axes.set_xlabel(first.size, fontsize=9)
    axes.tick_params(labelsize=8)
    plots.grid(axes)
    if costs := [cost for line in drawn for spread in line.costs.values() for cost in spread]:
        axes.set_ylim(*_spaced(costs, SPAN))
    else:
        axes.set(yticks=[])
        axes.text(0.5, 0.5, f"less than {SMALL:g} MB", transform=axes.transAxes, ha="center", color="grey", fontsize=9)


def _spaced(values: Sequence[float], span: float) -> tuple[float, float]:
    """Limits of a logarithmic axis around values: from the lower to the upper it is `span` times at least."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.1, (span * low / high) ** 0.5, 1.05)
    return low / margin, high * margin


def _scale(axis: Any, base: int, subs: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(base, subs))
    axis.set_minor_locator(NullLocator())


def _line(axes: Any, line: Line, color: str) -> None:
    """The median in a band of its noise, and a ring around each cliff."""
    if not line.costs:
        return
    sizes, (median, p20, p80) = list(line.costs), zip(*line.costs.values(), strict=True)
    look: dict[str, Any] = {"color": color, "zorder": 3 if line.variant == OURS else 2}
    axes.plot(sizes, median, STYLES[line.dtype], marker=".", markersize=4, linewidth=1.4, **look)
    axes.fill_between(sizes, p20, p80, alpha=0.15, linewidth=0, **look)
    if line.cliffs:
        axes.plot(line.cliffs, [line.costs[size][0] for size in line.cliffs], zorder=4, **CLIFF)


def _beside(sizes: Iterable[int]) -> list[list[int]]:
    """Ascending sizes in groups, of which the labels would lie upon each other."""
    groups: list[list[int]] = []
    for size in sizes:
        if groups and size < 1.2 * groups[-1][0]:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups


def _legend(sheet: Any, colors: dict[str, str], dtypes: Iterable[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles += [Line2D([], [], color="grey", linestyle=STYLES[dtype], label=dtype) for dtype in dtypes]
    handles.append(Line2D([], [], label=f"a cliff: over {LIMIT:g} times what its neighbours predict", **CLIFF))
    sheet.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)

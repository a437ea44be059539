"""Draws where bits come from: the terms of the bounds over the timesteps, and what each method's add up to."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern import files, plots
from diffkern.likelihood.record import Entry, Record
from diffkern.likelihood.vlb import shares
from diffkern.schedules import Schedule

SUFFIXES = (".png", ".svg", ".pdf")
CURVES = {"vlb": "transitions", "vdm": "diffusion"}  # the name of their terms over time
LINES: dict[str, Any] = {"vlb": "-", "vdm": "--"}
MARKS = {"vlb": "o", "vdm": "s", "ode": "D"}


def check(path: Path, methods: Collection[str]) -> None:
    """Raise ValueError if a plot of these methods cannot be drawn or written there, before any work is done for it."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw {path}: give a name that ends in {', '.join(SUFFIXES)}")
    if not set(CURVES) & set(methods):
        raise ValueError(f"--plot draws the terms of {' and '.join(CURVES)}: ask for one of them too")
    plots.check()
    files.check_writable(path)


def draw(record: Record, schedule: Schedule, path: Path) -> None:
    """Write the plot of a run, whole or not at all. schedule: of the model."""
    figure = plots.figure(11, 5)
    terms, totals = figure.subplots(1, 2, width_ratios=(2.2, 1))
    names, methods = list(record.data), [m for m in MARKS if m in {e.method for e in record.scored}]
    lowest, priors = [], []
    for entry in record.scored:
        place = names.index(entry.data)
        color, aside = f"C{place % 10}", 0.8 * (place - (len(names) - 1) / 2) / len(names)
        _total(totals, entry, methods.index(entry.method) + aside, color)
        if entry.method in CURVES:
            lowest.append(_curve(terms, entry, schedule, color))
            priors.append(_bits(entry)["prior"].mean().item())
    # linear up to 1, so that the decoder has its place at 0
    terms.set_xscale("symlog", linthresh=1, linscale=0.3)
    terms.set_xlim(-0.5, len(schedule) * 1.5)
    terms.xaxis.set_major_formatter(lambda t, _: f"{t:g}")
    terms.set(xlabel="timestep t", ylabel="bits/dim of a timestep", yscale="log", title="Where the bits come from")
    terms.set_ylim(bottom=min(lowest) / 3)
    _legend(terms, record, max(priors))
    plots.grid(terms)
    totals.set(ylabel="bits/dim", title="What they add up to")
    totals.set_ylim(0, 1.15 * max(e.likelihood.average()[0] for e in record.scored if e.likelihood is not None))
    totals.set_xticks(range(len(methods)), methods)
    totals.set_xlim(-0.6, len(methods) - 0.4)
    plots.grid(totals, axis="y")
    files.replace(path, plots.rendered(figure, path.suffix[1:].lower()))


def _bits(entry: Entry) -> dict[str, Tensor]:
    assert entry.likelihood is not None
    return {name: term / (entry.likelihood.dims * math.log(2)) for name, term in entry.likelihood.terms.items()}


def _curve(axes: Any, entry: Entry, schedule: Schedule, color: str) -> float:
    """The mean over the pictures of each term, in a band of its standard error; the prior and the decoder as marks.
    Returns the curve's lowest point."""
    bits = _bits(entry)
    parts = bits[CURVES[entry.method]]
    t, width = timesteps(schedule, entry.method, parts.shape[1])
    mean, error = _mean(parts / width)
    axes.plot(t, mean, LINES[entry.method], color=color, linewidth=1.3)
    axes.fill_between(t, (mean - error).clamp(min=mean / 10), mean + error, color=color, alpha=0.2, linewidth=0)
    for name, place, mark in (("decoder", 0, "v"), ("prior", len(schedule), "^")):
        axes.plot([place], [_mean(bits[name])[0]], mark, color=color, markersize=7, markeredgecolor="white", zorder=3)
    return mean.min().item()


def timesteps(schedule: Schedule, method: str, count: int) -> tuple[Tensor, Tensor]:
    """Where the terms of a bound between prior and decoder lie: the middle timestep of each, and how many timesteps it
    stands for. float64 [count] each."""
    T = len(schedule)
    if method == "vlb" and count == T - 1:
        return torch.arange(1, T, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    if method == "vlb":
        share = torch.cat([torch.zeros(1, dtype=torch.float64), shares(schedule).cumsum(0)])
    else:  # equal parts of log(1 + SNR), from noise to data
        part = ((schedule.alpha_t / schedule.sigma_t) ** 2).log1p()
        share = (part[0] - part) / (part[0] - part[-1])
    at = torch.linspace(0, 1, 2 * count + 1, dtype=torch.float64)
    above = torch.searchsorted(share, at).clamp(1, T - 1)
    edges = above - 1 + (at - share[above - 1]) / (share[above] - share[above - 1])
    middle, width = edges[1::2], edges[2::2] - edges[:-1:2]
    return (middle + 0.5, width) if method == "vlb" else (middle.flip(0), width.flip(0))


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the pictures and its standard error. values: [n, ...]."""
    error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.zeros_like(values[0])
    return values.mean(0), error


def _total(axes: Any, entry: Entry, x: float, color: str) -> None:
    assert entry.likelihood is not None
    mean, error = entry.likelihood.average()
    shown = 0.0 if math.isnan(error) else error
    axes.errorbar([x], [mean], [shown], fmt=MARKS[entry.method], color=color, capsize=4, markersize=6)
    # upright, so that two sets with like figures do not write over each other
    at: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "rotation": 90}
    axes.annotate(f"{mean:.2f}", (x, mean), (0, 7), fontsize=8, **at)


def _legend(axes: Any, record: Record, prior: float) -> None:
    from matplotlib.lines import Line2D

    shown = {e.method for e in record.scored}
    lines = [
        Line2D([], [], color=f"C{i % 10}", label=f"{name} ({facts['pictures']} pictures)")
        for i, (name, facts) in enumerate(record.data.items())
    ]
    lines += [Line2D([], [], color="grey", linestyle=s, label=m) for m, s in LINES.items() if m in shown]
    for label, mark in (("decoder term", "v"), (f"prior term, at most {prior:.1g}", "^")):
        lines.append(Line2D([], [], color="grey", marker=mark, linestyle="", label=label))
    axes.legend(handles=lines, fontsize=9)

"""Whole networks and sampling runs, against every rival."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffkern.bench.report.records import Record, Standing, by_machine, digits, spread, table, times, where

NAME = "end_to_end-*"
OURS, GRAPHED = "diffkern", "diffkern, graphed"
LOADED, ACCELERATED, RECORDED = "diffusers", "diffusers, accelerated", "diffusers, accelerated, recorded"
# What every program must compute: matrix products, convolutions and attention, by the names of their kernels on a CPU.
PRODUCTS = ("_linear_pointwise", "_convolution_pointwise", "::addmm", "::mm", "::bmm", "_scaled_dot_product",
            "_C::linear", "_C::convolution", "_C::winograd", "_C::taps", "_C::attention")  # fmt: skip
Best = dict[str, tuple[str, dict[str, float]]]
"""Of each rival its fastest form, and how many times as fast diffkern is."""


def on_gpu(record: Record) -> bool:
    """Every form of a network on a GPU says which form of diffkern it is compared with."""
    return "against" in record["results"]["variants"][OURS]


def rival(variant: str) -> str:
    """Whose form it is: torch.compile's of "torch.compile, max-autotune"; nobody's if diffkern is in it."""
    return "" if f"{variant}, ".startswith((f"{OURS}, ", f"{ACCELERATED}, ")) else variant.split(", ")[0]


def best(record: Record, against: str = OURS) -> Best:
    """The fastest form of each rival, of those that are compared with this form of diffkern."""
    found: Best = {}
    for variant, figures in record["results"]["variants"].items():
        ratio, of = figures["diffkern is faster by"], rival(variant)
        if of and figures.get("against", OURS) == against and ratio["median"] < _median(found.get(of)):
            found[of] = (variant, ratio)
    return found


def _median(known: tuple[str, dict[str, float]] | None) -> float:
    return known[1]["median"] if known else float("inf")


def forms(record: Record) -> Iterable[tuple[str, str, Best]]:
    """A network with its dtype, that form of diffkern which the rivals are compared with, and they."""
    r = record["results"]
    name, graphed = f"{r['network']}, {r['dtype']}", GRAPHED in r["variants"]
    if graphed:
        yield f"{name}, graph", GRAPHED, best(record, GRAPHED)
    yield f"{name}, no graph" if on_gpu(record) else name, OURS, best(record)


def standings(records: Iterable[Record]) -> list[Standing]:
    """Against the fastest rival of each network, with a graph and without. Rounds are paired: what is lost is lost in
    four of five."""
    found = []
    for record in records:
        v = record["results"]["variants"]
        for work, form, rivals in forms(record):
            if rivals:
                name, ratio = min(rivals.values(), key=lambda known: known[1]["median"])
                found.append(Standing(
                    where(record["machine"]), work, f"{form}, {spread(v[form]['ms'], 'ms')}",
                    f"{name}, {spread(v[name]['ms'], 'ms')}", ratio["median"], ratio["p80"] < 1,
                ))  # fmt: skip
    return found


def summary(records: list[Record]) -> str:
    """A line a network and dtype, machine by machine."""
    parts = []
    for gpu in (True, False):
        chosen = [record for record in records if on_gpu(record) == gpu]
        for machine, found in by_machine(chosen).items():
            parts.append(_gpu_table(machine, found) if gpu else _cpu_table(machine, found))
        if chosen:
            meant = {r["results"]["network"]: r["results"]["what"] for r in chosen}
            parts.append("; ".join(f"{name}: {what}" for name, what in meant.items()) + ".")
    return "\n\n".join(parts)


def _rivals(found: Iterable[Best]) -> list[str]:
    """All there are, in the order of their first appearance."""
    return list(dict.fromkeys(name for rivals in found for name in rivals))


def _ratios(names: Iterable[str], found: Best) -> list[str]:
    return [f"{found[name][1]['median']:.2f}" if name in found else "-" for name in names]


def _gpu_table(machine: str, records: list[Record]) -> str:
    with_graph, without = [best(r, GRAPHED) for r in records], [best(r) for r in records]
    names, others = _rivals(with_graph), _rivals(without)
    # A user's own call before and after the one line, which records a graph by itself; not in the first records.
    called = any(RECORDED in r["results"]["variants"] for r in records)
    rows = []
    for record, graphed, launched in zip(records, with_graph, without, strict=True):
        r, v = record["results"], record["results"]["variants"]
        ours = v.get(GRAPHED)
        own = v.get(f"{ACCELERATED}, graphed")
        rows.append([
            f"{r['network']}, {r['dtype']}", f"{ours['ms']['median']:.3g} ms" if ours else "-",
            *_ratios(names, graphed), f"{own['diffkern is faster by']['median']:.2f}" if own else "-",
            f"{v[OURS]['ms']['median']:.3g} ms", *_ratios(others, launched), *([_line(v)] if called else []),
        ])  # fmt: skip
    last = ["accelerate"] if called else []
    header = ["", "with a graph", *names, "accelerated diffusers", "without", *others, *last]
    return (
        f"{machine}. A call replayed from a CUDA graph, and called without one. How many times as fast as the fastest "
        "form of each rival, all with a graph or all without; torch.compile's max-autotune makes a graph itself"
        + ("; last, how many times as fast diffusers is called after `diffkern.accelerate` as before" if called else "")
        + ":\n\n"
        + table(header, rows)
    )


def _line(variants: dict[str, Any]) -> str:
    """diffusers as it is loaded over the same after `diffkern.accelerate`, both called by a user."""
    if RECORDED not in variants or LOADED not in variants:
        return "-"
    return f"{variants[LOADED]['ms']['median'] / variants[RECORDED]['ms']['median']:.2f}"


def _cpu_table(machine: str, records: list[Record]) -> str:
    rivals = [best(record) for record in records]
    names = _rivals(rivals)
    rows = []
    for record, found in zip(records, rivals, strict=True):
        r, v = record["results"], record["results"]["variants"]
        first, memory = ({name: [x[key] for n, x in v.items() if rival(n) == name] for name in names}
                         for key in ("first call, seconds", "peak memory, MB"))  # fmt: skip
        rows.append([
            f"{r['network']}, {r['dtype']}", f"{digits(v[OURS]['ms']['median'])} ms", *_ratios(names, found),
            f"{v[OURS]['first call, seconds']:.1f} s, {_least(first.get('torch.compile'), 's')}",
            f"{v[OURS]['peak memory, MB']} MB, {_least(memory.get('diffusers'), 'MB')}",
        ])  # fmt: skip
    last = ["first call: diffkern, torch.compile", "memory: diffkern, diffusers"]
    return f"{machine}. How many times as fast as each rival, the faster of its forms:\n\n" + table(
        ["", "diffkern", *names, *last], rows
    )


def _least(values: list[float] | None, unit: str) -> str:
    return f"{min(values):.0f} {unit}" if values else "-"


def details(records: list[Record]) -> str:
    """The same of all machines, then every variant."""
    return "\n\n".join(["## Networks", summary(records), *map(_network, records)])


def _network(record: Record) -> str:
    r = record["results"]
    deltas = [name for name in ("max delta", "rms delta") if name in r["variants"][OURS]]
    rows = [_variant(name, figures, deltas) for name, figures in r["variants"].items()]
    rows += [[name, f"not timed: {reason}", "", "", "", *("" for _ in deltas)] for name, reason in r["refused"].items()]
    header = ["", "ms (p20 to p80)", "diffkern is faster by", "first call", "peak memory", *deltas]
    parts = [f"### {r['network']}, {r['dtype']}, {where(record['machine'])}", f"{r['what']}.", table(header, rows)]
    if on_gpu(record):
        parts.append(
            "Graphed forms, and max-autotune, which makes a graph itself, are compared with diffkern, graphed."
        )
    if shares := ", ".join(f"{kernel} {100 * share:.0f} %" for kernel, share in r["profile"].items()):
        parts.append(f"Where diffkern's time goes: {shares}.")
    if not on_gpu(record):
        parts += _left_to_win(record)
    return "\n\n".join(parts)


def _left_to_win(record: Record) -> list[str]:
    """A sentence on how fast diffkern would be if nothing but products took time, if there are any."""
    profile = record["results"]["profile"]
    share = sum(share for kernel, share in profile.items() if any(name in kernel for name in PRODUCTS))
    bounds = ", ".join(f"{of} {ratio['median'] / share:.2f}" for of, (_, ratio) in best(record).items() if share)
    if not bounds:
        return []
    return [f"Products, convolutions and attention are {100 * share:.0f} % of it. If nothing else took time, diffkern "
            f"would be so many times as fast as each rival's fastest form: {bounds}."]  # fmt: skip


def _variant(name: str, v: dict[str, Any], deltas: list[str]) -> list[str]:
    once = [f"{v['first call, seconds']:.1f} s", f"{v['peak memory, MB']} MB"]
    if name.endswith(", graphed"):  # recorded from a form that has run; what it uses is the graph's own memory
        once = ["-", "-"]
    return [name, spread(v["ms"]), times(v["diffkern is faster by"]), *once, *(f"{v[delta]:.1g}" for delta in deltas)]

"""Writes the figures of the README and docs/figures.md from the committed records, so that none is typed.

python benchmarks/report.py            # between the markers in README.md, and docs/figures.md
python benchmarks/report.py --print
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import report_likelihood

ROOT = Path(__file__).parent.parent
RESULTS, README, DETAILS = ROOT / "benchmarks" / "results", ROOT / "README.md", ROOT / "docs" / "figures.md"
BEGIN, END = "<!-- {}: python benchmarks/report.py -->\n", "<!-- end of {} -->\n"
OURS = ("cuda", "triton", "cpu")
COMPILED = ("torch.compile", "torch.compile, max-autotune")
EAGER = ("diffusers", "diffusers, channels_last")
ACCELERATED = "diffusers, accelerated"


def load(name: str) -> list[dict[str, Any]]:
    """The records of that name, of all machines."""
    return [json.loads(f.read_text(encoding="utf-8")) for f in sorted(RESULTS.glob(f"*/{name}.json"))]


def where(machine: dict[str, Any]) -> str:
    devices, versions = machine["devices"], machine["versions"]
    name, _, instructions = devices["cpu"].split(", ")
    cpu = f"{name} with {instructions.split()[-1]}"
    device = next((v for k, v in devices.items() if k != "cpu"), f"{cpu}, {machine['threads']} threads")
    return f"{device}, torch {versions['torch']}"


def _digits(value: float) -> str:
    """No more digits than are measured."""
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def _best(variants: dict[str, Any], names: tuple[str, ...]) -> str:
    """How much faster diffkern is than the fastest of some variants."""
    ratios = [variants[n]["diffkern is faster by"]["median"] for n in names if n in variants]
    return f"{min(ratios):.2f}" if ratios else "-"


def on_gpu(record: dict[str, Any]) -> bool:
    """Whether a network was timed on a GPU: every form of it then says which form of diffkern it is compared with."""
    return "against" in record["results"]["variants"]["diffkern"]


def gpu_summary(records: list[dict[str, Any]]) -> str:
    """A line a network that was timed on a GPU, machine by machine."""
    lines: list[str] = []
    machine = ""
    for record in filter(on_gpu, records):
        r, v = record["results"], record["results"]["variants"]
        if machine != (machine := where(record["machine"])):
            lines += [
                *([""] if lines else []),
                f"{machine}. A call replayed from a CUDA graph, and called without one. How many times as fast as the "
                "fastest form of each rival, all with a graph or all without; torch.compile at its best is compared "
                "with a graph:",
                "",
                "| | with a graph | torch.compile | diffusers | accelerated diffusers | without | diffusers |",
                "|---|---|---|---|---|---|---|",
            ]
        ms = {name: row["ms"]["median"] for name, row in v.items()}
        graphed = {n.removesuffix(", graphed"): t for n, t in ms.items() if n.endswith(", graphed")}
        best = graphed.get("diffkern", ms["diffkern"])

        def times(rivals: list[float], ours: float) -> str:
            return f"{min(rivals) / ours:.2f}" if rivals else "-"

        lines.append(
            f"| {r['network']}, {r['dtype']} | {best:.3g} ms | "
            f"{times([t for n, t in ms.items() if n.startswith('torch.compile')], best)} | "
            f"{times([graphed[n] for n in EAGER if n in graphed], best)} | "
            f"{times([graphed[n] for n in (ACCELERATED,) if n in graphed], best)} | {ms['diffkern']:.3g} ms | "
            f"{times([ms[n] for n in EAGER if n in ms], ms['diffkern'])} |"
        )
    meant = {r["results"]["network"]: r["results"]["what"] for r in filter(on_gpu, records)}
    if not lines:
        return ""
    return "\n".join([*lines, "", "; ".join(f"{name}: {what}" for name, what in meant.items()) + ".", ""])


def networks_summary(records: list[dict[str, Any]]) -> str:
    """A line a network and dtype, machine by machine."""
    lines: list[str] = []
    machine = ""
    records = [record for record in records if not on_gpu(record)]
    for record in records:
        r, v = record["results"], record["results"]["variants"]
        if machine != (machine := where(record["machine"])):
            lines += [
                *([""] if lines else []),
                f"{machine}. How many times as fast as each rival, the faster of its forms:",
                "",
                "| | diffkern | torch.compile | diffusers | OpenVINO | first call: diffkern, torch.compile |"
                " memory: diffkern, diffusers |",
                "|---|---|---|---|---|---|---|",
            ]
        ours = v["diffkern"]
        compiled = min((v[n]["first call, seconds"] for n in COMPILED if n in v), default=None)
        eager = [v[n]["peak memory, MB"] for n in EAGER if n in v]
        lines.append(
            f"| {r['network']}, {r['dtype']} | {ours['ms']['median']:.0f} ms | {_best(v, COMPILED)} | "
            f"{_best(v, EAGER)} | {_best(v, ('OpenVINO',))} | "
            f"{ours['first call, seconds']:.1f} s, {'-' if compiled is None else f'{compiled:.0f} s'} | "
            f"{ours['peak memory, MB']} MB, {min(eager, default=0)} MB |"
        )
    meant = {r["results"]["network"]: r["results"]["what"] for r in records}
    return "\n".join([*lines, "", "; ".join(f"{name}: {what}" for name, what in meant.items()) + ".", ""])


def accelerated_summary(records: list[dict[str, Any]]) -> str:
    """A line a network and dtype in which accelerated diffusers was timed, machine by machine."""
    lines: list[str] = []
    machine = ""
    for record in records:
        r, v = record["results"], record["results"]["variants"]
        if ACCELERATED not in v or on_gpu(record):
            continue
        if machine != (machine := where(record["machine"])):
            lines += [
                *([""] if lines else []),
                f"{machine}. diffusers as it is loaded, after `diffkern.accelerate`, and under torch.compile too;"
                " accelerated is how many times as fast as its rivals and as diffkern's own model:",
                "",
                "| | diffusers | accelerated | compiled too | of diffusers | of torch.compile | of diffkern's own |",
                "|---|---|---|---|---|---|---|",
            ]
        ours = v["diffkern"]["ms"]["median"]
        ms = {name: v[name]["ms"]["median"] for name in v}
        fast = ms[ACCELERATED]
        compiled = min((ms[n] for n in COMPILED if n in ms), default=None)
        both = ms.get(f"{ACCELERATED}, torch.compile")
        lines.append(
            f"| {r['network']}, {r['dtype']} | {ms['diffusers']:.0f} ms | {fast:.0f} ms | "
            f"{'-' if both is None else f'{both:.0f} ms'} | {ms['diffusers'] / fast:.2f} | "
            f"{'-' if compiled is None else f'{compiled / fast:.2f}'} | {ours / fast:.2f} |"
        )
    return "\n".join([*lines, ""])


def network(record: dict[str, Any]) -> str:
    """Every variant of one network."""
    r = record["results"]
    lines = [
        f"### {r['network']}, {r['dtype']}, {where(record['machine'])}",
        "",
        f"{r['what']}.",
        "",
        "| | ms (p20 to p80) | diffkern is faster by | first call | peak memory | max delta |",
        "|---|---|---|---|---|---|",
    ]
    for name, v in r["variants"].items():
        ms, times = v["ms"], v["diffkern is faster by"]
        once = f"{v['first call, seconds']:.1f} s | {v['peak memory, MB']} MB"
        if name.endswith(", graphed"):  # recorded from a form that has run; what it uses is the graph's own memory
            once = "- | -"
        lines.append(
            f"| {name} | {_digits(ms['median'])} ({_digits(ms['p20'])} to {_digits(ms['p80'])}) | "
            f"{times['median']:.2f} ({times['p20']:.2f} to {times['p80']:.2f}) | {once} | {v['max delta']:.1g} |"
        )
    refused = {name: reason.replace("|", "\\|") for name, reason in r["refused"].items()}
    lines += [f"| {name} | not timed: {reason} | | | | |" for name, reason in refused.items()]
    if on_gpu(record):
        lines += [
            "",
            "Graphed forms, and max-autotune, which makes a graph itself, are compared with diffkern, graphed.",
        ]
    shares = ", ".join(f"{kernel} {100 * share:.0f} %" for kernel, share in r["profile"].items())
    return "\n".join([*lines, "", f"Where diffkern's time goes: {shares}.", ""])


def _row(row: dict[str, Any]) -> tuple[str, dict[str, Any], str, float] | None:
    """Our backend, its figures, the fastest rival, and how much faster than that it is."""
    times = row["times"]
    # A record of a GPU says which backend the op takes, be it PyTorch's own.
    backend = row.get("chosen") or next((b for b in OURS if b in times), "")
    if backend not in times:
        return None
    others = (n for n in times if n not in (*OURS, backend, "copy", "matmul"))
    rival = min(others, key=lambda n: times[n]["us"]["median"])
    return backend, times[backend], rival, times[rival]["us"]["median"] / times[backend]["us"]["median"]


def _floor(figures: dict[str, Any]) -> tuple[str, float, str]:
    """The ceiling that a kernel is measured by: that of memory, or of arithmetic if it multiplies; on a GPU, the longer
    of the two times that it would take at the ceilings of the device."""
    if "of floor" in figures:
        rate = f"{figures['GFLOP/s'] / 1e3:.0f} TFLOP/s" if "of matmul" in figures else f"{figures['GB/s']:.0f} GB/s"
        return rate, 100 * figures["of floor"], "of the floor"
    if "of matmul" in figures:
        return f"{figures['GFLOP/s']:.0f} GFLOP/s", 100 * figures["of matmul"], "of matmul"
    return f"{figures['GB/s']:.1f} GB/s", 100 * figures["of copy"], "of copy"


def _ceilings(rows: list[dict[str, Any]]) -> str:
    """What the floor of a GPU's ops is counted from."""
    found = next((row["ceilings"] for row in rows if "ceilings" in row), None)
    if found is None:
        return ""
    return f" (a copy {found['GB/s']:.0f} GB/s, read and written; a bfloat16 product {found['TFLOP/s']:.0f} TFLOP/s)"


def _machines() -> dict[str, list[dict[str, Any]]]:
    """The rows of all ops, machine by machine."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for record in load("ops-*"):
        machines.setdefault(where(record["machine"]), []).extend(record["results"])
    return machines


def ops_summary(machine: str, rows: list[dict[str, Any]]) -> str:
    """A line an op and dtype: the least and the most over its workloads."""
    groups: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for row in rows:
        if (found := _row(row)) is not None:
            _, figures, _, ratio = found
            groups.setdefault((row["op"], row["dtype"]), []).append((ratio, *_floor(figures)[1:]))
    lines = [
        f"{machine}{_ceilings(rows)}:",
        "",
        "| op | dtype | faster by | share of the ceiling |",
        "|---|---|---|---|",
    ]
    for (op, dtype), values in groups.items():
        faster, shares = [v[0] for v in values], [v[1] for v in values]
        lines.append(
            f"| {op} | {dtype} | {min(faster):.2f} to {max(faster):.2f} | "
            f"{min(shares):.0f} to {max(shares):.0f} % {values[0][2]} |"
        )
    return "\n".join([*lines, ""])


def ops(machine: str, rows: list[dict[str, Any]]) -> str:
    """Every workload of every op."""
    lines = [
        f"### Ops, {machine}",
        "",
        "The rival is the fastest of the reference, what one would write in PyTorch with its own generator, and",
        "torch.compile of both. The ceiling is a clone of as many bytes, or for products a matmul of as many",
        "operations; convolutions by Winograd's way do fewer than are counted.",
        *(
            [f"On this GPU it is the floor{_ceilings(rows)}; calls are replayed from a CUDA graph."]
            if _ceilings(rows)
            else []
        ),
        "",
        "| op | workload | dtype | backend | us (p20 to p80) | rate | of the ceiling | rival | faster by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if (found := _row(row)) is None:
            continue
        backend, figures, rival, faster = found
        us, (rate, share, _) = figures["us"], _floor(figures)
        lines.append(
            f"| {row['op']} | {row['sample']} | {row['dtype']} | {backend} | "
            f"{_digits(us['median'])} ({_digits(us['p20'])} to {_digits(us['p80'])}) | {rate} | {share:.0f} % | "
            f"{rival} | {faster:.2f} |"
        )
    return "\n".join([*lines, ""])


def schedulers(record: dict[str, Any]) -> str:
    """Every fused scheduler against diffusers' own."""
    rows = record["results"]
    lines = [
        f"### Fused schedulers, {where(record['machine'])}",
        "",
        f"Whole runs of {rows[0]['steps']} steps without a model: set_timesteps, scale_model_input and step.",
        "",
        "| scheduler | sample | dtype | us a step (p20 to p80) | faster than diffusers by |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        us, faster = row["us a step"]["fused"], row["faster by"]
        sample = " x ".join(map(str, row["sample"]))
        lines.append(
            f"| {row['scheduler'].removesuffix('Scheduler')} | {sample} | {row['dtype']} | "
            f"{us['median']:.0f} ({us['p20']:.0f} to {us['p80']:.0f}) | "
            f"{faster['median']:.2f} ({faster['p20']:.2f} to {faster['p80']:.2f}) |"
        )
    return "\n".join([*lines, ""])


def likelihoods() -> list[str]:
    """What the bundled model says of pictures, and how long a bound takes."""
    tables = [report_likelihood.scores(record) for record in load("likelihood")]
    machines: dict[str, list[dict[str, Any]]] = {}
    for record in load("vlb-*"):
        machines.setdefault(where(record["machine"]), []).append(record)
    return [*tables, *(report_likelihood.speed(records, name) for name, records in machines.items())]


def readme_with_figures() -> str:
    """README.md as it should be."""
    networks = load("end_to_end-*")
    parts = [
        *filter(None, [gpu_summary(networks)]),
        networks_summary(networks),
        accelerated_summary(networks),
        *(ops_summary(*item) for item in _machines().items()),
    ]
    text = README.read_text(encoding="utf-8")
    for name, found in (("likelihoods", likelihoods()), ("figures", parts)):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        text = before + begin + "\n".join(found) + end + rest.split(end)[1]
    return text


def details() -> str:
    """docs/figures.md as it should be."""
    parts = ["# Figures\n", "Written by `python benchmarks/report.py` from the records in benchmarks/results.\n"]
    parts += [*map(network, load("end_to_end-*")), *map(schedulers, load("schedulers"))]
    parts += [ops(*item) for item in _machines().items()]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print, and leave the files alone")
    if parser.parse_args().print:
        print(details())
    else:
        README.write_text(readme_with_figures(), encoding="utf-8")
        DETAILS.write_text(details(), encoding="utf-8")


if __name__ == "__main__":
    main()

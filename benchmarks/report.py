"""Writes the README's figures from the committed records, so that none is typed.

python benchmarks/report.py            # between the markers in README.md
python benchmarks/report.py --print
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures: python benchmarks/report.py -->\n", "<!-- end of figures -->\n"
OURS = ("cuda", "triton", "cpu")


def load(name: str) -> list[dict[str, Any]]:
    return [json.loads(f.read_text(encoding="utf-8")) for f in sorted(RESULTS.glob(f"*/{name}.json"))]


def where(machine: dict[str, Any]) -> str:
    devices, versions = machine["devices"], machine["versions"]
    device = next((v for k, v in devices.items() if k != "cpu"), devices["cpu"].split(",")[0])
    return f"{device}, {machine['threads']} threads, torch {versions['torch']}"


def end_to_end(record: dict[str, Any]) -> str:
    results = record["results"]
    lines = [
        f"{results['network']}, {results['n']} pictures, guidance {results['guidance']:g}, float32, "
        f"{where(record['machine'])}:",
        "",
        "| | ms a step (p20 to p80) | diffkern is faster by | first run |",
        "|---|---|---|---|",
    ]
    for name, r in results["variants"].items():
        ms, times = r["ms per step"], r["diffkern is faster by"]
        lines.append(
            f"| {name} | {ms['median']:.0f} ({ms['p20']:.0f} to {ms['p80']:.0f}) | "
            f"{times['median']:.2f} ({times['p20']:.2f} to {times['p80']:.2f}) | {r['first run, seconds']:.1f} s |"
        )
    return "\n".join([*lines, ""])


def ops(record: dict[str, Any]) -> str:
    lines = [
        f"Ops on their workloads, {where(record['machine'])}. The rival is the fastest of the reference, what one",
        "would write in PyTorch with its own generator, and torch.compile of both. A clone of as many bytes is 100 %.",
        "",
        "| op | workload | dtype | backend | GB/s | of copy | rival | faster by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["results"]:
        times = row["times"]
        backend = next((b for b in OURS if b in times), None)
        if backend is None:
            continue
        rival = min((n for n in times if n not in (*OURS, "copy")), key=lambda n: times[n]["us"]["median"])
        ours = times[backend]
        faster = times[rival]["us"]["median"] / ours["us"]["median"]
        lines.append(
            f"| {row['op']} | {row['sample']} | {row['dtype']} | {backend} | {ours['GB/s']:.1f} | "
            f"{100 * ours['of copy']:.0f} % | {rival} | {faster:.2f} |"
        )
    return "\n".join([*lines, ""])


def figures() -> str:
    """The Markdown of all records."""
    parts = [end_to_end(r) for r in load("end_to_end")] + [ops(r) for r in load("ops")]
    return "\n".join(parts)


def readme_with_figures() -> str:
    """README.md as it should be."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + figures() + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print, and leave the README alone")
    if parser.parse_args().print:
        print(figures())
    else:
        README.write_text(readme_with_figures(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""`diffkern bench report`: tables, pictures and a page of records, or the figures of a README."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffkern import files, plots
from diffkern.bench import record
from diffkern.bench.report import page, pictures, readme, sections

OUT = Path("report")


def add(commands: Any) -> None:
    """The arguments of the command, for the parser that argparse's `add_subparsers` gave."""
    r = commands.add_parser("report", help="tables, pictures and a page of records", description=_run.__doc__)
    r.add_argument("records", type=Path, nargs="?", default=record.RESULTS, metavar="RECORDS",
                   help=f"the folder that benchmarks wrote to (default {record.RESULTS})")  # fmt: skip
    r.add_argument("--out", type=Path, metavar="FOLDER",
                   help=f"of report.html, {readme.FIGURES} and the pictures (default {OUT})")  # fmt: skip
    r.add_argument("--readme", type=Path, metavar="FILE",
                   help="instead write the figures in this README, and in docs/ beside it")  # fmt: skip
    r.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Make a report of what benchmarks recorded: a page with every figure, the same as Markdown, and pictures."""
    if args.out and args.readme:
        raise ValueError("give --out or --readme, not both")
    records = sections.checked(args.records)
    plots.check()
    if args.readme:
        written = readme.files_of(args.readme, records)
    else:
        out = args.out or OUT
        drawn = pictures.draw(records)
        written = {out / name: png for name, png in drawn.items()}
        written[out / readme.FIGURES] = readme.figures(records, drawn).encode()
        written[out / "report.html"] = page.page(records, drawn).encode()
        out.mkdir(parents=True, exist_ok=True)
    for path in written:
        files.check_writable(path)
    for path, data in written.items():
        files.replace(path, data)
        print(path)

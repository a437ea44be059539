"""`diffkern bench curves`: what it is asked for, whether that makes sense, and what it prints."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffkern import options
from diffkern.bench import axes, curves, curves_plot, record
from diffkern.bench.compare import Timing
from diffkern.bench.cpus import keep_kernels, pinned
from diffkern.bench.networks import DTYPES
from diffkern.bench.rivals import left_out, named, rivals
from diffkern.columns import aligned
from diffkern.progress import progress_bar
from diffkern.schedules import one_of

RIVALS = ("eager", "diffusers")
ROUNDS = 3  # with --quick
BAR = "{desc} {percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"


def add(commands: Any) -> None:
    """The arguments of the command, for the parser that argparse's `add_subparsers` gave."""
    c = commands.add_parser("curves", help="how time and memory grow with the size", description=_run.__doc__)
    c.add_argument("--axis", action="append", metavar="NAME",
                   help=f"{', '.join(axes.AXES)}; may be given again (default all)")  # fmt: skip
    c.add_argument("--dtype", action="append", metavar="NAME",
                   help=f"{', '.join(DTYPES)}; may be given again (default both, with --quick float32)")  # fmt: skip
    c.add_argument("--rivals", metavar="KINDS", default=",".join(RIVALS),
                   help=f"{','.join(rivals())}, or none (default {','.join(RIVALS)})")  # fmt: skip
    c.add_argument("--quick", action="store_true", help="a few small sizes, in fewer rounds: whether all of this runs")
    c.add_argument("--rounds", type=int,
                   help=f"in each all sizes are timed in turn (default as many as take {curves.SECONDS:.0f} s a curve, "
                        f"{curves.FEWEST} to {curves.MOST}; with --quick {ROUNDS})")  # fmt: skip
    c.add_argument("--threads", type=int, help="of the CPU (default torch's)")
    c.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER",
                   help=f"of the records, FOLDER/<machine>/curves-<axis>.json (default {record.RESULTS})")  # fmt: skip
    c.add_argument("--no-record", action="store_true", help="print, and write no record")
    c.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves: .png, .svg or .pdf")
    c.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Run ops and networks at many sizes on the CPU, and say how time and memory grow: over pictures a call, their
    size, channels, tokens and steps. A size that costs more than 1.3 times what the sizes beside it predict, beyond
    noise, is named as a cliff. What computes something else is refused. Ctrl-C keeps what is done. Exit code 1:
    diffkern was refused."""
    for name in args.axis or ():
        one_of("axis", name, axes.AXES)
    for name in args.dtype or ():
        one_of("dtype", name, DTYPES)
    wanted = named(args.rivals)
    args.threads = torch.get_num_threads() if args.threads is None else args.threads
    options.at_least(1, threads=args.threads)
    if args.rounds is not None:
        options.at_least(1, rounds=args.rounds)
    elif args.quick:
        args.rounds = ROUNDS
    if args.plot is not None:
        curves_plot.check(args.plot)
    if not args.no_record:
        args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before minutes of work
    dtypes = args.dtype or (["float32"] if args.quick else list(DTYPES))
    chosen = [c for c in axes.CURVES if (not args.axis or c.axis in args.axis) and (c.quick or not args.quick)]
    keep_kernels()
    with pinned(args.threads):
        return _measure(args, [(curve, dtype) for curve in chosen for dtype in dtypes], wanted)


@torch.no_grad()  # not inference mode: copies of weights made in it are packed anew in every call
def _measure(args: argparse.Namespace, work: Sequence[tuple[axes.Curve, str]], wanted: Sequence[str]) -> int:
    """Measure, print and write. Networks need diffusers, which makes their weights and says what is right."""
    needed = [*wanted, *(["diffusers"] if any(curve.network for curve, _ in work) else [])]
    missing = left_out(dict.fromkeys(needed), "cpu")
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    if "diffusers" in missing:
        work = [(curve, dtype) for curve, dtype in work if curve.network is None]
    wanted = [name for name in wanted if name not in missing]
    rows: list[dict[str, Any]] = []
    try:
        with progress_bar(None, total=len(work), bar_format=BAR) as bar:
            for curve, dtype in work:
                bar.set_description(f"{curve.name}, {dtype}")
                sizes = curve.quick if args.quick else curve.sizes
                with tempfile.TemporaryDirectory() as folder:
                    row = curves.measure(curve, DTYPES[dtype], sizes, wanted, args.rounds, Path(folder), bar.update)
                rows.append(row)
                tqdm.write(in_words(row) + "\n")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(rows)} curves were measured") from None
    finally:  # what was measured is kept, whatever ended the run
        for axis in dict.fromkeys(row["axis"] for row in rows) if not args.no_record else ():
            found = [row for row in rows if row["axis"] == axis]
            print(record.write(f"curves-{axis}", "cpu", found, args.out, missing))
        if rows and args.plot is not None:
            curves_plot.draw(rows, args.plot)
            print(args.plot)
    return 1 if any(name.endswith(f", {curves.OURS}") for row in rows for name in row["refused"]) else 0


def in_words(row: dict[str, Any]) -> str:
    """A row of a record as it is printed: a line a size, and below what the curves say."""
    variants, steep = list(row["findings"]), curves.cliffs_of(row)
    lines = [
        (row["size"], *(w for v in variants for w in (f"{v} (p20 to p80)", "time / n", "memory")), "faster by", "")
    ]
    for point in row["points"]:
        size, found = point["size"], point["variants"]
        figures = [figure for v in variants for figure in _figures(found.get(v), size ** row["power"])]
        faster = [f["diffkern is faster by"]["median"] for f in found.values() if "diffkern is faster by" in f]
        here = [f"a cliff: {c.variant}, {c.times:.2f} times the {c.what}" for c in steep if c.size == size]
        lines.append((f"{size}", *figures, f"{min(faster):.2f}" if faster else "", "; ".join(here)))
    return "\n".join([
        f"{row['curve']}, {row['dtype']}: {row['what']}; n: {row['n']}; {row['rounds']} rounds",
        aligned(lines),
        *(f"{variant}: {_said(finding)}" for variant, finding in row["findings"].items()),
        *(f"not timed: {name}: {reason}" for name, reason in row["refused"].items()),
    ])  # fmt: skip


def _figures(found: dict[str, Any] | None, n: int) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    scale, unit = (1e3, "ms") if found["us"]["median"] >= 1e4 else (1.0, "us")
    timing = Timing(unit=unit, **{key: us / scale for key, us in found["us"].items()})
    memory = curves.volume(found["MB"]) if "MB" in found else "?"
    return str(timing), curves.duration(found["us"]["median"] / n), memory


def _said(finding: dict[str, Any]) -> str:
    """How a variant's costs grow, in words."""
    words = [f"{what} ~ n^{k:.2f} at the end" for what, f in finding.items() if (k := f["exponent"]) is not None]
    if "fixed, us" in finding["time"]:
        fixed, each = finding["time"]["fixed, us"], finding["time"]["each n, us"]
        words.append(f"a call takes {curves.duration(max(0.0, fixed))} and {curves.duration(each)} for each n")
    return ", ".join(words) or "too few sizes to say how it grows"

"""`diffkern bench compare`: two records of timings against each other, in a table."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from diffkern.bench.compare import Change, Comparison, compare
from diffkern.columns import aligned

REGRESSION = 5.0  # percent, unless told otherwise


def add(commands: Any) -> None:
    """The arguments of the command, for the parser that argparse's `add_subparsers` gave."""
    c = commands.add_parser("compare", help="what got faster or slower beyond noise", description=_run.__doc__)
    c.add_argument("before", type=Path, help="a record, or a folder of records")
    c.add_argument("after", type=Path, help="a record of the same kind, or a folder of records of the same names")
    c.add_argument("--regression", type=float, default=REGRESSION, metavar="PERCENT",
                   help="what may get slower by beyond noise, before the exit code is 1 (default 5)")  # fmt: skip
    c.add_argument("--all", action="store_true", help="list what is within noise as well")
    c.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Print what got faster or slower from one record to another: where the two intervals from the 20th to the 80th
    percentile have nothing in common. What is left is noise. Where a record says what the machine could do beside an
    op, a copy and a product, that is no result but the yardstick: a change must be one also after it is taken off.
    Exit code 1: something is slower beyond noise, and its median by more than --regression percent."""
    if not 0 <= args.regression < math.inf:
        raise ValueError(f"--regression must be a percentage of 0 or more, not {args.regression}")
    found = compare(args.before, args.after)
    if found.differences:
        print(f"diffkern bench: warning: not the same {'; '.join(found.differences)}", file=sys.stderr)
    print(f"before: {args.before}\nafter: {args.after}")
    if found.moved:
        print(f"the machine itself: {'; '.join(_machine(found.moved))}")
    if changes := _listed(found, args.all):
        rows = [("", "", "before", "after", "time")]
        rows += [(c.verdict, c.name, str(c.before), str(c.after), f"{c.percent:+.1f} %") for c in changes]
        print(f"\n{aligned(rows)}\n")
    for where, names in (("before", found.only_before), ("after", found.only_after)):
        for name in names:
            print(f"only {where}: {name}")
    for name in found.left_out:
        print(f"not compared: {name}, which has no timings")
    count = {verdict: sum(c.verdict == verdict for c in found.changes) for verdict in ("faster", "slower", "noise")}
    worse = sum(c.regresses(args.regression) for c in found.changes)
    print(
        f"of {len(found.changes)} timings {count['faster']} are faster, {count['slower']} slower and {count['noise']} "
        f"within noise; {worse or 'none'} slower by more than {args.regression:g} %"
    )
    return 1 if worse else 0


def _machine(moved: dict[str, list[float]]) -> Iterator[str]:
    for ceiling, times in moved.items():
        yield (
            f"{ceiling} takes {median(times):.3g} times as long (from {min(times):.3g} to {max(times):.3g}, "
            f"beside {len(times)} timings)"
        )


def _listed(found: Comparison, everything: bool) -> list[Change]:
    """What the table shows: the slowest first, and noise, if it is wanted, at the end."""
    shown = [c for c in found.changes if everything or c.verdict != "noise"]
    return sorted(shown, key=lambda c: (("slower", "faster", "noise").index(c.verdict), -abs(c.percent)))

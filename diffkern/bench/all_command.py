"""`diffkern bench all`: every benchmark, one after the other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffkern.bench import record
from diffkern.bench.networks import DTYPES
from diffkern.bench.rivals import named, rivals
from diffkern.schedules import one_of

ORDER = ("ops", "end-to-end", "curves", "cold-start")
TINY = {
    "ops": ["--tiny", "--rounds", "2"],
    "end-to-end": ["--tiny", "--networks", "vae-512", "--rounds", "1"],
    "cold-start": ["--quick", "--rounds", "1"],
}


def add(commands: Any) -> None:
    """The arguments of the command, for the parser that argparse's `add_subparsers` gave."""
    a = commands.add_parser("all", help=f"{', '.join(ORDER)}, one after the other", description=_run.__doc__)
    a.add_argument("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (default of each benchmark)")
    a.add_argument("--rivals", metavar="NAMES", help=f"{','.join(rivals())}, or none (default of each benchmark)")
    a.add_argument("--quick", action="store_true", help="a little of each")
    a.add_argument("--tiny", action="store_true", help=f"{', '.join(TINY)} with small sizes: whether all of this runs")
    a.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER",
                   help=f"of the records, FOLDER/<machine> (default {record.RESULTS})")  # fmt: skip
    a.set_defaults(run=lambda args: _run(args, commands.choices))


def _run(args: argparse.Namespace, parts: dict[str, argparse.ArgumentParser]) -> int:
    """Run every benchmark, each as its own command does by default. Ctrl-C keeps what is done. Exit code 1: something
    was not timed."""
    if args.dtype is not None:
        one_of("dtype", args.dtype, DTYPES)
    if args.rivals is not None:
        named(args.rivals)
    given = ["--out", str(args.out), *(["--quick"] if args.quick else [])]
    for option in ("dtype", "rivals"):
        if getattr(args, option) is not None:
            given += [f"--{option}", getattr(args, option)]
    missing = 0
    for name in TINY if args.tiny else [name for name in ORDER if name in parts]:
        print(f"== {name}", flush=True)
        part = parts[name].parse_args([*given, *(TINY[name] if args.tiny else [])])
        try:
            missing += part.run(part)
        except ValueError as error:  # such as diffusers, which is not here
            missing += 1
            print(f"{name}: not timed: {error}")
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"in {name} {stop}" if str(stop) else f"{name} was not timed") from None
    return 1 if missing else 0

"""`diffkern bench`: time what diffkern does against its rivals, and compare records of timings."""

from __future__ import annotations

import argparse

from diffkern.bench import (
    all_command,
    cold_start,
    compare_command,
    curves_command,
    end_to_end_command,
    ops_command,
    report_command,
)

PARTS = {
    "ops": ops_command,
    "end-to-end": end_to_end_command,
    "curves": curves_command,
    "cold-start": cold_start,
    "all": all_command,
    "compare": compare_command,
    "report": report_command,
}
"""The commands, in the order of the help: each module's `add` makes the parser of one."""


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = "Time diffkern against what else there is, and compare the records that benchmarks write."
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(PARTS), parser_class=type(parser))
    for part in PARTS.values():
        part.add(commands)

"""How likely the bundled model finds pictures that it was trained with, that it was not, and that are no emoji at all.

    python benchmarks/bench_likelihood.py     # into benchmarks/results/<machine>/likelihood.json
    python benchmarks/bench_likelihood.py -n 2 --no-record

Runs `diffkern likelihood`, whose own file holds every picture's figures, and keeps the averages. --plot also draws the
picture of the README."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffkern import cli
from diffkern.bench import record

SETS = ("train", "held-out", "digits", "noise")
KEPT = ("data", "method", "pictures", "bits_per_dim", "standard_error", "noise", "seconds", "evaluations")


def averages(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each set and method of a finished run, with the labels that its pictures were scored as."""
    return [{key: row[key] for key in KEPT} | {"labels": run["data"][row["data"]]["labels"]} for row in run["results"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=179, help="pictures of each set (default 179, all that are held out)")
    parser.add_argument("--plot", type=Path, help="where to draw the picture of the terms")
    parser.add_argument("--state", type=Path, help="a file for the run itself, from which it goes on")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the records")
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    sets = [word for name in SETS for word in ("--data", name)]
    command = ["likelihood", "--model", "emoji-32", *sets, "-n", str(options.n)]
    with tempfile.TemporaryDirectory() as scratch:
        state = options.state or Path(scratch) / "likelihood.json"
        plot = [] if options.plot is None else ["--plot", str(options.plot)]
        if code := cli.main([*command, "--out", str(state), *plot]):
            sys.exit(code)
        run = json.loads(state.read_text(encoding="utf-8"))
    if not options.no_record:
        results = {"command": shlex.join(["diffkern", *command]), "settings": run["settings"], "rows": averages(run)}
        print(record.write("likelihood", run["settings"]["device"], results, options.out))


if __name__ == "__main__":
    main()

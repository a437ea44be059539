"""What every benchmark shares: interleaved timing, the facts about the machine, and the record that is committed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

import diffkern
from diffkern import doctor, files
from diffkern.bench import cpus

Key = TypeVar("Key", bound=Hashable)
PACKAGE = Path(diffkern.__file__).resolve().parent
RESULTS = Path("benchmarks/results")  # where records go unless told otherwise: of the checkout that one stands in


def interleave(
    variants: Mapping[Key, Callable[[], object]], rounds: int, at_least: float = 0.0,
    done: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:  # fmt: skip
    """Seconds a call of each variant in each round. Every round runs all of them in turn, so that a machine that slows
    down slows them all. at_least: repeat a call until a measurement takes about so many seconds. done: called after
    each measurement. The caller has run each variant once already, to check it."""
    repeats = dict.fromkeys(variants, 1)
    if at_least:
        for name, run in variants.items():
            once = measured(run, 1)
            if once < at_least:
                once = min(once, measured(run, 1), measured(run, 1))
            repeats[name] = max(1, int(at_least / max(once, 1e-7)))
    seconds: dict[Key, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(measured(run, repeats[name]))
            done()
    return seconds


def measured(run: Callable[[], object], repeat: int) -> float:
    """Seconds a call, of so many in a row."""
    _synchronise()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    _synchronise()
    return (time.perf_counter() - start) / repeat


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return dict(zip(("median", "p20", "p80"), (float(f"{q:.4g}") for q in quantiles.tolist()), strict=True))


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster, paired round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure: versions, hardware, threads, commit and command."""
    facts = doctor.report()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": facts["versions"] | _versions_of_rivals(),
        "devices": facts["devices"],
        "threads": torch.get_num_threads(),
        "cpus": cpus.facts(),
        "commit": _commit(),
        "command": _command(sys.argv),
    }


def _versions_of_rivals() -> dict[str, str]:
    from diffkern.bench.rivals import FIRST, rivals  # not before: what they need of this package is not there yet

    found: dict[str, str] = {}
    for name in rivals():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found |= {} if name in FIRST else {name: importlib.metadata.version(name)}
    return found


def _commit() -> str | None:
    """The commit of diffkern; None where it is installed without its repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:  # the repository around an installed copy is another's: it does not know this file
        return (git("ls-files", "__init__.py") and git("describe", "--always", "--dirty")) or None
    except OSError:  # no git here
        return None


def _command(argv: list[str]) -> str:
    """The command without the places of its files, which are nobody's but the user's."""
    program, *arguments = argv
    for option in ("--out", "--plot", "--state"):
        at = arguments.index(option) if option in arguments else len(arguments)
        arguments = arguments[:at] + arguments[at + 2 :]
        arguments = [a for a in arguments if not a.startswith(f"{option}=")]
    for i, argument in enumerate(arguments):  # of a file its name, and a model's name stays what it is
        if argument.startswith("--shapes="):
            arguments[i] = f"--shapes={Path(argument.removeprefix('--shapes=')).name}"
        elif i and arguments[i - 1] == "--shapes":
            arguments[i] = Path(argument).name
    installed = Path(program).name in ("diffkern", "diffkern.exe", "cli.py")
    return " ".join([*(["diffkern"] if installed else ["python", program]), *arguments])


def folder_name(device: str) -> str:
    """The results folder of this kind of machine."""
    cpu = f"{doctor.cpu_name()} {doctor.cpu_instructions()} {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(
    name: str, device: str, results: Any, folder: Path = RESULTS, left_out: Mapping[str, str] | None = None
) -> Path:
    """Write <folder>/<machine>/<name>.json. left_out: the rivals that were not here, and why. Returns its path."""
    path = folder / folder_name(device) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "left out": left_out or {}, "results": results}, indent=1) + "\n"
    files.replace(path, text.encode())
    return path

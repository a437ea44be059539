"""How long a user waits for the first picture: from the start of a process until a PNG of emoji-32 is on disk.

`diffkern sample -n 1` against a script that does the same with diffusers, as it is and under torch.compile: cold, when
what is compiled once is not there yet (diffkern's C++ library, torch.compile's kernels), and warm, when it is. Files
that were read before are in the system's cache either way. All are started in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffkern import options
from diffkern.bench import first_picture, record
from diffkern.bench.children import Failure, environment, reason
from diffkern.bench.compare import Timing
from diffkern.bench.first_picture import GUIDANCE, STEPS
from diffkern.bench.networks import DTYPES
from diffkern.bench.rivals import installed, named
from diffkern.columns import aligned
from diffkern.models.bundle import ASSETS
from diffkern.progress import progress_bar
from diffkern.schedules import one_of

MODEL, LABEL = "emoji-32", 0
WHAT = f"a picture of {MODEL}: guidance, {STEPS} steps of DPM-Solver++ 2M"
RIVALS = {"diffusers": "diffusers", "compile": "torch.compile"}
"""The forms of the rivals that can draw a picture, by the names of their files."""
CACHES = {"diffkern": ("DIFFKERN_CACHE",), "torch.compile": ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
"""Where each looks for what was compiled before."""


class Starts:
    """Processes that draw a picture each, in a folder of their own."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self.folder, self.out = folder, folder / "picture.png"
        self.sample = ["--model", MODEL, "-n", "1", "--label", LABEL, "--sampler", "dpmpp_2m", "--dtype", dtype,
                       "--device", device, "--steps", STEPS, "--guidance", GUIDANCE,
                       "--out", self.out]  # fmt: skip
        self.script = [ASSETS / MODEL, dtype, device, LABEL, self.out]

    def picture(self, variant: str, cold: int | None = None) -> float | Failure:
        """Seconds until the picture is there. cold: the number of a cache that is empty; default a warm one."""
        command = [first_picture.__file__, variant, *self.script]
        if variant == "diffkern":
            command = ["-m", "diffkern.cli", "sample", *self.sample]
        name = "warm" if cold is None else f"cold-{cold}"
        caches = {key: str(self.folder / name / key) for key in CACHES.get(variant, ())}
        if variant == "diffkern" and cold is None:
            caches = {}  # the user's own, which was filled by the first call
        started = time.time()
        found = self._run(command, caches, until=str(self.out))
        return found if isinstance(found, Failure) else found[0] - started

    def phases(self) -> dict[str, float] | Failure:
        """Seconds that each part of `diffkern sample` takes."""
        started = time.time()
        found = self._run([first_picture.__file__, "phases", *self.sample], {}, until="{")
        if isinstance(found, Failure):
            return found
        done = json.loads(found[1])
        return {
            phase: at - before for (phase, at), before in zip(done.items(), [started, *done.values()], strict=False)
        }

    def _run(self, command: list[Any], more: dict[str, str], until: str) -> tuple[float, str] | Failure:
        """When the process printed a line that begins so, in seconds since the epoch, and the line; or a Failure."""
        self.out.unlink(missing_ok=True)
        variables = {**environment(), "PYTHONUNBUFFERED": "1", **more}
        with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
        ) as process:  # fmt: skip
            assert process.stdout is not None
            found = None
            for line in process.stdout:
                if line.startswith(until):
                    found = time.time(), line
            if process.wait() or found is None or not self.out.is_file():
                errors.seek(0)
                return Failure(reason(process.returncode, errors.read()))
            return found


class Times:
    """What was measured so far."""

    def __init__(self, starts: Starts, names: list[str], refused: dict[str, str]) -> None:
        self.starts, self.names, self.refused = starts, names, dict(refused)
        self.seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        self.phases: dict[str, list[float]] = {}

    def runs(self, rounds: int, cold: int) -> list[tuple[str, Callable[[], None]]]:
        """All that is to be run, in order: each in words, and as a call. The first warm start only fills the caches."""
        found: list[tuple[str, Callable[[], None]]] = []
        for i in range(cold):
            found += [(f"{name}, cold", partial(self.start, name, "cold", i)) for name in self.names if name in CACHES]
        for i in range(1 + rounds):
            kind = "warm" if i else ""
            found += [(f"{name}, warm", partial(self.start, name, kind)) for name in self.names]
            found += [("phases", self.take_phases)] if i else []
        return found

    def start(self, name: str, kind: str, cold: int | None = None) -> None:
        if name in self.refused:
            return
        found = self.starts.picture(name, cold)
        if isinstance(found, Failure):
            self.refused[name] = str(found)
            del self.seconds[name]
        elif kind:
            self.seconds[name].setdefault(kind, []).append(found)

    def take_phases(self) -> None:
        found = self.starts.phases()
        if isinstance(found, Failure):
            self.refused["phases"] = str(found)
        else:
            for phase, value in found.items():
                self.phases.setdefault(phase, []).append(value)

    def results(self, dtype: str) -> dict[str, Any]:
        variants = {name: {kind: record.spread(values) for kind, values in found.items()}
                    for name, found in self.seconds.items() if found}  # fmt: skip
        warm = {name: found["warm"] for name, found in self.seconds.items() if "warm" in found}
        for name, values in warm.items():
            if "diffkern" in warm and name != "diffkern":
                ours = warm["diffkern"][: len(values)]  # Ctrl-C may come in the middle of a round
                variants[name]["diffkern is faster by"] = record.ratio(values[: len(ours)], ours)
        return {
            "first picture": MODEL, "what": WHAT, "dtype": dtype, "variants": variants, "refused": self.refused,
            "phases": {phase: record.spread(values) for phase, values in self.phases.items()},
        }  # fmt: skip


def in_words(results: dict[str, Any]) -> str:
    """A record as it is printed: a line a variant, and below where diffkern's time goes."""

    def seconds(found: dict[str, Any], kind: str) -> str:
        return str(Timing(unit="s", **found[kind])) if kind in found else "-"

    rows = [(f"first picture, {results['dtype']}", "cold (p20 to p80)", "warm (p20 to p80)", "diffkern is faster by")]
    for name, found in results["variants"].items():
        faster = found.get("diffkern is faster by")
        times = f"{faster['median']:.2f}" if faster else ""
        rows.append((f"  {name}", seconds(found, "cold"), seconds(found, "warm"), times))
    lines = [aligned(rows), *(f"  {name}: not timed: {why}" for name, why in results["refused"].items())]
    if results["phases"]:
        parts = [("parts of diffkern's, warm", "p20 to p80")]
        parts += [(f"  {phase}", str(Timing(unit="s", **found))) for phase, found in results["phases"].items()]
        lines.append(aligned(parts))
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write the record. args: names of variants, refused, dtype, device, rounds, cold, out.
    Returns 1 if diffkern was not timed."""
    stopped = False
    with tempfile.TemporaryDirectory() as folder:
        times = Times(Starts(Path(folder), args.dtype, args.device), args.names, args.refused)
        try:
            work = times.runs(args.rounds, args.cold)
            with progress_bar(None, total=len(work), unit="start") as bar:
                for words, call in work:
                    bar.set_description(words)
                    call()
                    bar.update()
        except KeyboardInterrupt:
            stopped = True
    results = times.results(args.dtype)
    if results["variants"]:
        print(in_words(results))
        print(record.write("cold_start", args.device, results, args.out))
    if stopped:
        raise KeyboardInterrupt(f"{len(results['variants'])} variants were timed")
    return 0 if "diffkern" in results["variants"] else 1


def add(commands: Any) -> None:
    """The arguments of the command, for the parser that argparse's `add_subparsers` gave."""
    c = commands.add_parser("cold-start", help="time the first picture of a process", description=_run.__doc__)
    c.add_argument("--dtype", default="float32", metavar="NAME", help=f"{', '.join(DTYPES)} (default float32)")
    c.add_argument("--rivals", metavar="NAMES",
                   help=f"{','.join(RIVALS)}, or none (default both; with --quick diffusers); other rivals draw no "
                        "picture")  # fmt: skip
    c.add_argument("--quick", action="store_true", help="few rounds, and nothing cold")
    c.add_argument("--device", default="auto", help="auto, cpu or cuda (default: a GPU if there is one)")
    c.add_argument("--rounds", type=int, help="of warm starts (default 9, with --quick 2)")
    c.add_argument("--cold", type=int, help="rounds of cold starts (default 3, with --quick 0)")
    c.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER",
                   help=f"of the record, FOLDER/<machine>/cold_start.json (default {record.RESULTS})")  # fmt: skip
    c.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Time how long a user waits for the first picture of emoji-32: `diffkern sample -n 1`, and the same with diffusers
    and torch.compile, with nothing compiled yet and with all of it. Ctrl-C keeps what is done. Exit code 1: diffkern
    drew no picture."""
    one_of("device", args.device, ("auto", "cpu", "cuda"))
    one_of("dtype", args.dtype, DTYPES)
    args.device = options.device_of(args.device).type
    args.rounds = (2 if args.quick else 9) if args.rounds is None else args.rounds
    args.cold = (0 if args.quick else 3) if args.cold is None else args.cold
    options.at_least(1, rounds=args.rounds)
    options.at_least(0, cold=args.cold)
    default = "diffusers" if args.quick else ",".join(RIVALS)
    names = [name for name in named(args.rivals or default) if name in RIVALS]
    args.refused = {RIVALS[name]: why for name in names if (why := installed("diffusers")(args.device))}
    args.names = ["diffkern", *(RIVALS[name] for name in names if RIVALS[name] not in args.refused)]
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the work
    return run(args)

"""Whole networks and sampling runs, diffkern against what users have today, on the same weights.

Every variant is first run in a process of its own: how long its first call takes, what memory it needs, and whether
its result is that of diffusers in float32. One that is wrong is refused. Then all are timed in turn in one process, for
a second of calls or one call each, and diffkern is profiled. What a GPU runs: end_to_end_gpu.py.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import diffkern
from diffkern.bench import children, record
from diffkern.bench.compare import Timing
from diffkern.bench.networks import DTYPES, NETWORKS, Make, Network, Run, deltas, wrong
from diffkern.bench.rivals import left_out, rivals
from diffkern.columns import aligned
from diffkern.progress import progress_bar

SLOW = 3.0  # seconds of a call: above, there are fewer of them
AT_LEAST = 1.0  # seconds of a measurement: a sampler calls a network again and again, with what it needs in the caches
EACH = 2 * 3600.0  # seconds that a process may take for an answer: compilers need many minutes


def _inside(context: Callable[[], contextlib.AbstractContextManager[None]]) -> Make:
    """diffkern's own network, called inside a block."""

    def make(network: Network, folder: Path, dtype: torch.dtype) -> Run:
        call = network.ours(folder, dtype)

        def run() -> torch.Tensor:
            with context():
                return call()

        return run

    return make


OURS: dict[str, Make] = {
    "diffkern": _inside(contextlib.nullcontext),
    "diffkern, unrecorded": _inside(diffkern.unrecorded),
    "diffkern, batch_invariant": _inside(diffkern.batch_invariant),
}


def variants(names: Iterable[str] | None = None) -> dict[str, Make]:
    """What makes a run of each form of diffkern, and of these rivals; default: of all."""
    theirs = [rivals()[name].networks for name in (rivals() if names is None else names)]
    return {name: make for forms in (OURS, *theirs) for name, make in forms.items()}


def not_here(names: Iterable[str]) -> dict[str, str]:
    """Of these rivals' forms, those that cannot be timed here, and why."""
    return {form: reason for name, reason in left_out(names, "cpu").items() for form in rivals()[name].networks}


def _memory(key: str) -> int:
    """A figure of this process in MB: VmRSS or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


def first(network: str, variant: str, dtype: str, folder: str, result: str) -> dict[str, float]:
    """What a process of its own finds out about a variant. Leaves the result in a file."""
    import diffusers  # noqa: F401  its memory is nobody's

    before = _memory("VmRSS")
    run = variants()[variant](NETWORKS[network], Path(folder), DTYPES[dtype])
    start = time.perf_counter()
    out = run()
    seconds = [time.perf_counter() - start]
    while len(seconds) < 2 or (len(seconds) < 4 and seconds[-1] < SLOW):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    torch.save(out.float(), result)
    return {"first": seconds[0], "later": min(seconds[1:]), "MB": _memory("VmHWM") - before}


def together(network: str, names: list[str], dtype: str, folder: str, rounds: int) -> dict[str, Any]:
    """Seconds of a call of each variant in each round; and where diffkern's time goes: the share of every kernel that
    takes 1 % or more."""
    make = variants()
    runs = {name: make[name](NETWORKS[network], Path(folder), DTYPES[dtype]) for name in names}
    for run in runs.values():
        run()
    seconds = record.interleave(runs, rounds, AT_LEAST)
    with torch.profiler.profile() as found:
        runs["diffkern"]()
    times = {e.key: e.self_cpu_time_total for e in found.key_averages()}
    shares = {k: t / sum(times.values()) for k, t in sorted(times.items(), key=lambda item: -item[1])}
    return {"seconds": seconds, "profile": {k: round(share, 3) for k, share in shares.items() if share >= 0.01}}


@torch.no_grad()
def _answer(item: list[Any]) -> Any:
    what, *args = item
    return first(*args) if what == "first" else together(*args)


@contextlib.contextmanager
def child(cache: Path) -> Iterator[children.Child]:
    """A process for a part of the work. cache: where torch.compile finds what it has compiled before."""
    found = children.Child(["-m", __spec__.name], {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    try:
        yield found
    finally:
        found.end()


def _cache(folder: Path, dtype: str, variant: str) -> Path:
    return folder / f"{dtype}-{list(variants()).index(variant)}"  # compilers are given this path: no spaces


class Measured:
    """One network: its folder of weights, and what diffusers makes of it in float32."""

    def __init__(self, network: str, folder: Path, bar: Any) -> None:
        self.network, self.folder, self.bar = network, folder, bar
        self.result = folder / "result.pt"
        NETWORKS[network].make(folder)
        self.plain = self.first("diffusers", "float32")
        self.expected = None if isinstance(self.plain, children.Failure) else torch.load(self.result)

    def first(self, variant: str, dtype: str) -> Any:
        """The figures, or a Failure. The cache is empty, so that the first call compiles."""
        with child(_cache(self.folder, dtype, variant)) as process:
            return process.ask(["first", self.network, variant, dtype, str(self.folder), str(self.result)], EACH)

    def admit(self, variant: str, dtype: str) -> dict[str, Any] | str:
        """The row of a variant so far, or why it has none."""
        assert self.expected is not None
        if (variant, dtype) == ("diffusers", "float32"):
            cold, found = self.plain, self.expected
        else:
            cold = self.first(variant, dtype)
            if isinstance(cold, children.Failure):
                return str(cold)
            found = torch.load(self.result)
        delta = deltas(found, self.expected)
        return wrong(delta, dtype) or {
            "first call, seconds": float(f"{cold['first']:.4g}"),
            "later call, seconds": float(f"{cold['later']:.4g}"),
            "peak memory, MB": cold["MB"],
            **delta,
        }

    def measure(self, dtype: str, names: Iterable[str], refused: Mapping[str, str], rounds: int) -> Any:
        """The record in one dtype, or a Failure. refused: what is known not to run, and why."""
        if self.expected is None:
            return children.Failure(f"diffusers itself does not run: {self.plain}")
        rows: dict[str, dict[str, Any]] = {}
        refused = dict(refused)
        for name in names:
            self.bar.set_description(f"{self.network}, {dtype}, {name}")
            found = self.admit(name, dtype)
            if isinstance(found, str):
                refused[name] = found
            else:
                rows[name] = found
            self.bar.update()
        if "diffkern" not in rows:
            return children.Failure(f"diffkern is refused: {refused['diffkern']}")
        self.bar.set_description(f"{self.network}, {dtype}, in turn")
        with child(_cache(self.folder, dtype, "torch.compile")) as process:
            timed = process.ask(["together", self.network, list(rows), dtype, str(self.folder), rounds], EACH)
        self.bar.update()
        if isinstance(timed, children.Failure):
            return timed
        seconds = timed["seconds"]
        for name, row in rows.items():
            row["ms"] = record.spread([1000 * s for s in seconds[name]])
            row["diffkern is faster by"] = record.ratio(seconds[name], seconds["diffkern"])
        return {
            "network": self.network, "what": NETWORKS[self.network].what, "dtype": dtype, "variants": rows,
            "refused": refused, "profile": timed["profile"],
        }  # fmt: skip


def records(options: argparse.Namespace, bar: Any) -> Iterator[tuple[str, str, Any]]:
    """(network, dtype, its record or why there is none)."""
    for network in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            measured = Measured(network, Path(folder), bar)
            for dtype in options.dtype:
                yield network, dtype, measured.measure(dtype, options.variants, options.refused, options.rounds)


def in_words(results: Any) -> str:
    """A record as it is printed: a line a variant."""
    rows = [(f"{results['network']}, {results['dtype']}", "ms (p20 to p80)", "diffkern is faster by", "first call",
             "peak memory", "rms delta")]  # fmt: skip
    for name, row in results["variants"].items():
        rows.append((
            f"  {name}", str(Timing(unit="ms", **row["ms"])), f"{row['diffkern is faster by']['median']:.2f}",
            f"{row['first call, seconds']:.1f} s", f"{row['peak memory, MB']} MB", f"{row['rms delta']:.1g}",
        ))  # fmt: skip
    return "\n".join([aligned(rows), *(f"  {name}: not timed: {why}" for name, why in results["refused"].items())])


def keep(found: Iterable[tuple[str, str, Any]], device: str, out: Path) -> int:
    """Print each record, or why there is none, and write it. Returns 1 if one is missing."""
    written = missing = 0
    try:
        for network, dtype, results in found:
            if isinstance(results, children.Failure):
                missing += 1
                tqdm.write(f"{network}, {dtype}: not timed: {results}")
                continue
            tqdm.write(in_words(results))
            tqdm.write(str(record.write(f"end_to_end-{network}-{dtype}", device, results, out)))
            written += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{written} records were written") from None
    return 1 if missing else 0


def run(options: argparse.Namespace) -> int:
    """Measure what is asked for, print it, and write a record for each network and dtype. options: networks, dtype,
    variants, refused, rounds, out. Returns 1 if something was not timed."""
    steps = len(options.networks) * len(options.dtype) * (len(options.variants) + 1)
    with progress_bar(None, total=steps, unit="step") as bar:
        return keep(records(options, bar), "cpu", options.out)


if __name__ == "__main__":
    children.serve(_answer)

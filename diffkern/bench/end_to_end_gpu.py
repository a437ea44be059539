"""Whole networks on a GPU: how `diffkern bench end-to-end --device cuda` runs.

A network has a process for all forms that are not compiled, and one for each that is. All get ready in parallel; what
is not ready in time is left out, and the record says so. Then, network by network, a form is refused whose result is
not that of diffusers in float32, and all are timed in turn, one at a time: as they are called, and replayed from a CUDA
graph ("graphed"), without what Python and the launches take. max-autotune makes such a graph by itself, and so does
`diffkern.accelerate` ("recorded").
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern.bench import children, gpu, record
from diffkern.bench.end_to_end import keep
from diffkern.bench.networks import Emoji, Run, deltas, wrong
from diffkern.bench.networks_gpu import COMPILED, NETWORKS, RECORDED, Built, build

EACH = 60.0  # seconds that a process may take for an answer once all are prepared


def graphed(run: Run) -> Run:
    """The run in a CUDA graph: nothing is left for the host to do but to start it."""
    replay = gpu.Replay(lambda: run, [()], calls=1)

    def again() -> Tensor:
        replay.graph.replay()
        return replay.results[0]

    return again


def has_own_graph(variant: str) -> bool:
    """Whether a form records a graph by itself."""
    return variant == RECORDED or variant.startswith("torch.compile, max")


class Forms:
    """One process's part: some forms of one network, in the order in which the parent asks for the methods."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny, self.cuda = device, tiny, device == "cuda"
        self.rows: dict[str, dict[str, Any]] = {}
        self.refused: dict[str, str] = {}
        self.runs: dict[str, Run] = {}

    def prepare(self, name: str, variants: list[str], folder: str) -> bool:
        """Build the network, and run every form once: that compiles, and finds kernels, which may happen in parallel.
        The process that has diffkern among its forms leaves the result expected of all."""
        self.built = build(name, self.device, self.tiny)
        self.expected = Path(folder) / f"{name}.pt"
        if "diffkern" in variants:
            torch.save(self.built.theirs("diffusers", torch.float32)().float(), self.expected)
        for variant in variants:
            start = time.perf_counter()
            run = self.try_out(variant, functools.partial(self.built.run, variant))
            if run is not None:
                self.rows[variant] = {"first call, seconds": time.perf_counter() - start}
            if variant in COMPILED and run is not None:
                self.runs[variant] = run  # not to be compiled again
            del run
            if self.cuda:
                torch.cuda.empty_cache()  # the memory is for the other processes
        return True

    def try_out(self, variant: str, make: Callable[[], Run]) -> Run | None:
        """The run, after a first call; or None, and it is refused."""
        try:
            run = make()
            run()
            if self.cuda:
                torch.cuda.synchronize()
            return run
        except RuntimeError as error:
            if "illegal" in str(error):  # nothing runs in this process any more
                raise
            self.refused[variant] = str(error).strip().splitlines()[0][:200]
            return None

    def admit(self) -> dict[str, Any]:
        """Make every form again and compare it with what is expected. Returns the rows so far, and what is refused."""
        expected = torch.load(self.expected)
        for variant in list(self.rows):
            run = self.runs.get(variant) or self.built.run(variant)
            self.judge(variant, run, expected, self.rows[variant]["first call, seconds"])
            if not self.cuda or has_own_graph(variant):
                continue
            name = f"{variant}, graphed"
            if isinstance(self.built, Built):
                make = functools.partial(graphed, run)
            elif variant == "diffkern":  # the loops of the others cannot be captured
                make = functools.partial(self.built.run, name)
            else:
                continue
            if (replay := self.try_out(name, make)) is not None:
                self.judge(name, replay, expected, 0.0)
        return {"rows": self.rows, "refused": self.refused}

    def judge(self, variant: str, run: Run, expected: Tensor, first: float) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        for _ in range(5):  # max-autotune records its graph in the second call, accelerate in the fourth
            out = run()
        delta = deltas(out, expected)
        peak = (torch.cuda.max_memory_allocated() - before if self.cuda else 0) + self.built.weights()
        self.rows.pop(variant, None)
        if reason := wrong(delta, "bfloat16"):
            self.refused[variant] = reason
            self.runs.pop(variant, None)
            return
        self.runs[variant] = run
        self.rows[variant] = {
            "first call, seconds": float(f"{first:.4g}"),
            "later call, seconds": float(f"{record.measured(run, 1):.4g}"),
            "peak memory, MB": peak >> 20,
            **delta,
        }

    def round(self) -> dict[str, float]:
        """Seconds a call of every form, measured once."""
        repeats = {v: max(1, int(0.05 / row["later call, seconds"])) for v, row in self.rows.items()}
        return {variant: record.measured(self.runs[variant], n) for variant, n in repeats.items()}

    def profile(self) -> dict[str, float]:
        return profile(self.runs["diffkern"], self.cuda)

    @torch.no_grad()
    def answer(self, item: list[Any]) -> Any:
        method, *args = item
        return getattr(self, method)(*args)


def profile(run: Run, cuda: bool) -> dict[str, float]:
    """The share of every kernel that takes 1 % or more."""
    with torch.profiler.profile() as found:
        run()
    times = {e.key[:80]: e.self_device_time_total if cuda else e.self_cpu_time_total for e in found.key_averages()}
    total = sum(times.values()) or 1
    ordered = sorted(times.items(), key=lambda entry: -entry[1])
    return {name: round(t / total, 3) for name, t in ordered if t / total >= 0.01}


def prepared(options: argparse.Namespace, folder: str, until: float) -> dict[str, list[tuple[list[str], Any]]]:
    """For each network its processes, and of which forms each is: a Child that is ready, or why it is not."""
    eager = [v for v in options.variants if v not in COMPILED]
    largest_first = sorted(options.networks, key=list(NETWORKS).index, reverse=True)
    jobs = [(name, eager) for name in largest_first]
    jobs += [(name, [v]) for v in COMPILED if v in options.variants for name in largest_first]
    found: dict[str, list[tuple[list[str], Any]]] = {name: [] for name in options.networks}

    def prepare(job: tuple[str, list[str]]) -> None:
        name, variants = job
        left = until - time.monotonic()
        answer: Any = children.Failure("no time was left to compile it")
        if left > 0:
            child = children.Child(["-m", __spec__.name, options.device, *(["tiny"] if options.tiny else [])])
            answer = child.ask(["prepare", name, variants, folder], left)
            if isinstance(answer, children.Failure):
                child.end()
            else:
                answer = child
        print(f"{name}, {', '.join(variants)}: {answer if isinstance(answer, str) else 'ready'}", flush=True)
        found[name].append((variants, answer))

    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(prepare, jobs))
    for entries in found.values():  # the one that diffkern is in comes first
        entries.sort(key=lambda entry: "diffkern" not in entry[0])
    return found


def measure(name: str, processes: list[tuple[list[str], Any]], rounds: int, until: float) -> Any:
    """The record of a network, or a Failure."""
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    alive: list[children.Child] = []

    def ask(child: children.Child, method: str) -> Any:
        return child.ask([method], max(1.0, min(EACH, until - time.monotonic())))

    for variants, child in processes:
        answer = child if isinstance(child, children.Failure) else ask(child, "admit")
        if isinstance(answer, children.Failure):
            refused |= dict.fromkeys(variants, str(answer))
        else:
            rows |= answer["rows"]
            refused |= answer["refused"]
            alive.append(child)
    if "diffkern" not in rows:
        return children.Failure(f"diffkern is refused: {refused.get('diffkern')}")
    seconds: dict[str, list[float]] = {variant: [] for variant in rows}
    for _ in range(rounds):
        for child in alive:
            answer = ask(child, "round")
            if isinstance(answer, children.Failure):
                return answer
            for variant, value in answer.items():
                seconds[variant].append(value)
    for variant, row in rows.items():
        alone = variant.endswith("graphed") or has_own_graph(variant)
        against = "diffkern, graphed" if alone and "diffkern, graphed" in rows else "diffkern"
        row["ms"] = record.spread([1000 * s for s in seconds[variant]])
        row |= {"against": against, "diffkern is faster by": record.ratio(seconds[variant], seconds[against])}
    network = NETWORKS[name]
    what = f"emoji-32, {Emoji.N} pictures, {Emoji.STEPS} steps" if network is None else network.what
    shares = ask(alive[0], "profile")
    return {
        "network": name, "what": what, "dtype": "bfloat16", "variants": rows, "refused": refused,
        "profile": {} if isinstance(shares, children.Failure) else shares,
    }  # fmt: skip


def records(options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """(network, dtype, its record or why there is none)."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = prepared(options, folder, start + 0.6 * options.seconds)
        print(f"prepared in {time.monotonic() - start:.0f} s", flush=True)
        for name, processes in found.items():
            yield name, "bfloat16", measure(name, processes, options.rounds, start + options.seconds)
            for _, child in processes:  # their memory is for the next network
                if isinstance(child, children.Child):
                    child.end()


def run(options: argparse.Namespace) -> int:
    """As end_to_end.run. options: networks, variants, device, rounds, processes, seconds, tiny, out."""
    return keep(records(options), options.device, options.out)


def main(device: str, *tiny: str) -> None:
    """A child's part."""
    if device == "cuda":
        gpu.settings()
    children.serve(Forms(device, bool(tiny)).answer)


if __name__ == "__main__":
    main(*sys.argv[1:])

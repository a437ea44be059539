"""Every op on its workloads: each backend against what else there is, after a check that it is right.

Rivals, timed in turn so that all of them see the same machine: every backend that can run, the reference, what a user
would write today with torch's own generator ("torch"; of a gradient, autograd's way back), torch.compile of both, and
what libraries have (see `rivals`); a clone of as many bytes ("copy"; on a GPU their negation) and, for an op that
multiplies, a matmul with a packed weight of as many operations ("matmul"; on a GPU a large one that is measured once).

With --processes, so many of them first check and compile all that follows, in parallel; then one times it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import diffkern
from diffkern.bench import children, gpu, memory, record, rivals
from diffkern.bench.compare import Change, Timing
from diffkern.bench.plain import PRODUCTS
from diffkern.bench.rivals import Bind, Run, later
from diffkern.bench.shapes import workloads
from diffkern.columns import aligned
from diffkern.op import OPS, Backend, Cost, Op, Sample
from diffkern.testing import check

Item = tuple[str, str, str]  # op, dtype, sample
SIDE = 1024  # of the weight of the matmul that they are compared with
EACH = 60.0  # seconds that a child may take for an item


def backends(op: Op, args: tuple[Any, ...], wanted: list[str]) -> list[Backend]:
    """Those that can run, in order of preference; of the wanted ones, if any are named."""
    return [b for b in op.backends if (not wanted or b.name in wanted) and b.why_not(args) is None]


def calls(op: Op, args: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Bind]:
    """What is compared, by name: called once with the arguments, each gives the call to time."""
    ours = {b.name: later(b) for b in backends(op, args, options.backend)}
    theirs = rivals.calls(op, args, options.device, options.rivals)
    return ours | theirs | ceiling_calls(op, args, options.device)


def ceiling_calls(op: Op, args: tuple[Any, ...], device: str) -> dict[str, Bind]:
    """What no kernel is faster than: a copy of as many bytes, and a product of as many operations."""
    cost = op.count_cost(*args)
    half = cost.bytes // 2
    if device == "cuda":  # a kernel: what a graph does for a copy is slower
        return {"copy": lambda *_: torch.ones(-(-half // 2), dtype=torch.float16, device=device).neg}
    calls: dict[str, Bind] = {"copy": lambda *_: torch.ones(half, dtype=torch.uint8).clone}
    if op.name in PRODUCTS:
        dtype = next(a.dtype for a in args if isinstance(a, Tensor))
        rows = -(-cost.flops // (2 * SIDE**2))
        x, weight = (torch.randn(n, SIDE).to(dtype) for n in (rows, SIDE))
        calls["matmul"] = lambda *_: lambda: diffkern.linear(x, weight)
    return calls


def figures(times: list[float], cost: Cost, copy: list[float], matmul: list[float] | None) -> dict[str, Any]:
    spread = record.spread([t * 1e6 for t in times])
    found = {
        "us": spread,
        "GB/s": float(f"{cost.bytes / spread['median'] / 1e3:.3g}"),
        "of copy": record.ratio(copy, times)["median"],
    }
    if matmul is not None:
        found["GFLOP/s"] = float(f"{cost.flops / spread['median'] / 1e3:.3g}")
        found["of matmul"] = record.ratio(matmul, times)["median"]
    return found


def work(options: argparse.Namespace) -> Iterator[tuple[Op, str, Sample]]:
    """All that is timed. On a GPU every op's first workload comes first, and what is only for a GPU before the rest, in
    case the time is short."""
    found: list[tuple[tuple[bool, int], tuple[Op, str, Sample]]] = []
    for name in options.op:
        for dtype in options.dtype:
            kind = options.device, getattr(torch, dtype)
            if options.tiny:
                samples = [next(s for s in OPS[name].make_samples(*kind) if not s.workload)]
            else:
                samples = list(workloads(OPS[name], options.shapes, *kind))
            order = sorted(samples[: 1 if options.quick else None], key=lambda sample: sample.workload != "cuda")
            found += [((s.workload != "cuda", i), (OPS[name], dtype, s)) for i, s in enumerate(order)]
    if options.device == "cuda":
        found.sort(key=lambda entry: entry[0])
    return iter([item for _, item in found])


class Bench:
    """One process's part: it makes, checks and times items."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.items = {(op.name, dtype, sample.name): (op, sample) for op, dtype, sample in work(options)}
        self.cuda = options.device == "cuda"
        if self.cuda:
            gpu.settings(timed=options.child != "check")  # trying float64 kernels of an oracle would take seconds

    def check(self, item: Item) -> str:
        """Why an item must not be timed, or nothing. What it would compile is compiled then."""
        op, sample = self.items[item]
        args = op.bind(*sample.args())
        able = backends(op, args, self.options.backend)
        if not able and self.options.backend:
            return f"{op.name} has no {' or '.join(self.options.backend)} that can take it here"
        for backend in able:
            try:
                check(op, backend.name, args)
            except AssertionError as wrong:
                return str(wrong)
        if self.cuda:
            torch.cuda.empty_cache()  # the oracle's memory, for the processes beside this one
        compiled = {name: bind for name, bind in calls(op, args, self.options).items() if name.endswith("compiled")}
        bound(compiled, args)
        return ""

    def time(self, item: Item, ceilings: dict[str, float]) -> dict[str, Any]:
        """The record of an item."""
        op, sample = self.items[item]
        args = op.bind(*sample.args())
        cost = op.count_cost(*args)
        binds = calls(op, args, self.options)
        row = {"op": op.name, "sample": sample.name, "dtype": item[1], "bytes": cost.bytes, "flops": cost.flops}
        if not self.cuda:
            able, refused = bound(binds, args)
            times = record.interleave(able, self.options.rounds, at_least=5e-3)
            copy, matmul = times["copy"], times.get("matmul")
            found = {name: figures(t, cost, copy, matmul) | _peak(able[name], "cpu") for name, t in times.items()}
            return row | _chosen(op, args, found) | {"times": found, "refused": refused}
        times, launched, refused = gpu.interleave(binds, gpu.sets_of(args, cost.bytes), self.options.rounds)
        arithmetic = cost.flops / ceilings["TFLOP/s"] / 1e12
        floor = max(cost.bytes / ceilings["GB/s"] / 1e9, arithmetic)
        able, _ = bound({name: binds[name] for name in times}, args)
        found = {}
        for name, t in times.items():
            matmul = [arithmetic] * len(t) if op.name in PRODUCTS and name != "copy" else None
            found[name] = figures(t, cost, times["copy"], matmul)
            found[name] |= {"us without a graph": float(f"{launched[name] * 1e6:.4g}"),
                            "of floor": float(f"{floor * 1e6 / found[name]['us']['median']:.3g}"),
                            **_peak(able[name], "cuda")}  # fmt: skip
        return row | _chosen(op, args, found) | {"ceilings": ceilings, "times": found, "refused": refused}


def bound(binds: Mapping[str, Bind], args: tuple[Any, ...]) -> tuple[dict[str, Run], dict[str, str]]:
    """The calls, each made once: that compiles, and fills caches. And why some cannot be made."""
    able: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, bind in binds.items():
        try:
            call = bind(*args)
            call()
        except (RuntimeError, NotImplementedError) as error:
            if "CUDA error: an illegal" in str(error):  # nothing runs in this process any more
                raise
            refused[name] = str(error).strip().splitlines()[0]
        else:
            able[name] = call
    return able, refused


def _chosen(op: Op, args: tuple[Any, ...], timed: Mapping[str, Any]) -> dict[str, str]:
    """The backend that such a call takes by itself, if it was timed."""
    name = op.choose(args).name
    return {"chosen": name} if name in timed else {}


def _peak(call: Run, device: str) -> dict[str, float]:
    peak = memory.peak_mb(call, device)
    return {} if peak is None else {"peak MB": peak}


def in_children(options: argparse.Namespace) -> Iterator[tuple[Item, Any]]:
    """Rows, or why there is none: all are checked and compiled in parallel, and what passes is timed in one process."""
    items = [(op.name, dtype, sample.name) for op, dtype, sample in work(options)]
    again = sys.orig_argv[1:]  # this command, however Python was told to run it
    start = time.monotonic()
    # What was not checked in the first 45 % of the time is not timed.
    checked = children.answers(
        [*again, "--child", "check"], items, options.processes, start + 0.45 * options.seconds, EACH
    )
    passed = set()
    for item, wrong in tqdm(checked, total=len(items), desc="check and compile", disable=None):
        if wrong:
            yield tuple(item), children.Failure(wrong)
        else:
            passed.add(tuple(item))
    print(f"checked {len(items)} calls in {time.monotonic() - start:.0f} s, {len(passed)} to be timed", flush=True)
    ordered = [item for item in items if item in passed]
    yield from children.answers([*again, "--child", "time"], ordered, 1, start + options.seconds, EACH)


def in_process(options: argparse.Namespace) -> Iterator[tuple[Item, Any]]:
    bench = Bench(options)
    ceilings = gpu.ceilings() if bench.cuda else {}
    for item in tqdm(bench.items, disable=None):
        wrong = bench.check(item)
        yield item, children.Failure(wrong) if wrong else bench.time(item, ceilings)


def in_words(row: dict[str, Any]) -> str:
    """A row of a record as it is printed: a line a variant, and how much faster than it the first one is."""
    first, *_ = row["times"]
    title = f"{row['op']}, {row['sample']}, {row['dtype']}"
    lines = [(title, "time (p20 to p80)", "rate", "of the ceiling", "peak", "")]
    times = {name: Timing(unit="us", **found["us"]) for name, found in row["times"].items()}
    for name, found in row["times"].items():
        rate, share = f"{found['GB/s']:.3g} GB/s", f"{100 * found['of copy']:.0f} % of copy"
        if "of matmul" in found and name != "copy":
            rate, share = _flops(found["GFLOP/s"]), f"{100 * found['of matmul']:.0f} % of matmul"
        against = ""
        if name not in (first, "copy", "matmul"):
            change = Change(name, times[first], times[name])
            against = f"{first} is {change.after.median / change.before.median:.3g} times as fast"
            against += ", within noise" if change.verdict == "noise" else ""
        peak = f"{found['peak MB']:.1f} MB" if "peak MB" in found else ""
        lines.append((f"  {name}", str(times[name]), rate, share, peak, against))
    return "\n".join([aligned(lines), *(f"  {name}: not timed: {why}" for name, why in row["refused"].items())])


def _flops(giga: float) -> str:
    return f"{giga / 1e3:.3g} TFLOP/s" if giga >= 1e3 else f"{giga:.3g} GFLOP/s"


@torch.no_grad()  # not inference mode: copies of weights made in it are packed anew in every call
def run(options: argparse.Namespace) -> int:
    """Time what is asked for, print it, and write a record for each op. Returns 1 if something was not timed."""
    if options.child:
        bench = Bench(options)
        if options.child == "check":
            children.serve(lambda item: bench.check(tuple(item)))
        else:
            ceilings = gpu.ceilings() if bench.cuda else {}
            children.serve(lambda item: bench.time(tuple(item), ceilings))
        return 0
    left_out = rivals.left_out(options.rivals, options.device)
    for why in dict.fromkeys(left_out.values()):
        print(f"not timed: {', '.join(name for name in left_out if left_out[name] == why)}: {why}")
    rows: dict[str, list[dict[str, Any]]] = {}
    refused = 0
    try:
        for item, row in in_children(options) if options.processes else in_process(options):
            if isinstance(row, children.Failure):
                refused += 1
                tqdm.write(f"{', '.join(item)}: not timed: {row}")
                continue
            rows.setdefault(item[0], []).append(row)
            tqdm.write(in_words(row))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{sum(map(len, rows.values()))} calls were timed") from None
    finally:  # what was timed is kept, whatever ended the run
        for name, found in rows.items() if not options.no_record else ():
            print(record.write(f"ops-{name}", options.device, found, options.out, left_out))
    return 1 if refused else 0

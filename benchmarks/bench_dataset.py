"""What a long job costs: how much faster two processes are than one, and what a picture and the memory take as n grows.

    python benchmarks/bench_dataset.py     # into benchmarks/results/<machine>/dataset.json
    python benchmarks/bench_dataset.py --quick --no-record
    python benchmarks/bench_dataset.py --whole 50000    # one job of that size, into .../dataset-whole.json

Every process has one thread, draws emoji with the bundled model, and has drawn some before the clock starts. Jobs of
one process and of several run in turn, so that a machine that slows down slows them all. Efficiency is the pictures a
second that each of several processes makes, over those that one makes alone. A whole job tells whether it is as fast
at its end as at its beginning, by the times at which its shards were written, and what memory each process came to."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffkern
from diffkern.bench import record

BATCH, SHARD = 32, 32
WHOLE_SHARD = 128  # of a whole job, which has 40 shards at least
MARK = "job: "  # in front of what a job says of itself: torchrun prints as well


def job(n: int, steps: int, shard: int, out: str) -> None:
    """What each process of a job does."""
    import torch.distributed as dist

    emoji = diffkern.load("emoji-32")
    table = diffkern.make_table("dpmpp_2m", emoji.schedule, steps)
    labels = list(range(len(emoji.labels)))
    diffkern.sample(emoji.model, table, BATCH, labels=labels[0])
    dist.init_process_group("gloo")
    dist.barrier()
    before = peak_mb()
    done = diffkern.sample_dataset(
        emoji.model, table, n, out=out, labels=labels, shard_size=shard, batch_size=BATCH, progress=False
    )
    found = {"n": n, "seconds": done.seconds, "peak_mb": peak_mb(), "peak_mb_before": before}
    print(MARK + json.dumps({"rank": dist.get_rank(), **found}), flush=True)


def peak_mb() -> float:
    """The most memory that this process has taken so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def measure(n: int, steps: int, processes: int, shard: int = SHARD) -> tuple[list[dict[str, Any]], list[float]]:
    """A job of so many processes: what each of them says, and when each shard was done, in seconds, in order."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
             __file__, "--job", str(n), str(steps), str(shard), str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        times = sorted(path.stat().st_mtime for path in out.glob("shard-*.json"))
    said = [json.loads(line[len(MARK) :]) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or len(said) != processes:
        raise RuntimeError(done.stderr)
    return sorted(said, key=lambda each: each["rank"]), times


def whole(n: int, steps: int, processes: int) -> dict[str, Any]:
    """One job, as long as it is."""
    shard = max(1, min(WHOLE_SHARD, n // 40))
    said, times = measure(n, steps, processes, shard)
    edges = [round(tenth * (len(times) - 1) / 10) for tenth in range(11)]
    rates = [shard * (b - a) / (times[b] - times[a]) for a, b in itertools.pairwise(edges)]
    return {
        "model": "emoji-32", "steps": steps, "batch": BATCH, "shard": shard, "whole": n, "processes": processes,
        "seconds": round(said[0]["seconds"], 1), "pictures_per_second_by_tenth": [float(f"{r:.4g}") for r in rates],
        "peak_mb_before": [each["peak_mb_before"] for each in said], "peak_mb": [each["peak_mb"] for each in said],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=512, help="pictures of a job (default 512)")
    parser.add_argument("--steps", type=int, default=4, help="of DPM-Solver++ 2M (default 4)")
    parser.add_argument("--processes", type=int, default=2, help="that are compared with one (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="jobs of each kind (default 5)")
    parser.add_argument("--quick", action="store_true", help="a few pictures, to see that it runs")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the records")
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing")
    parser.add_argument("--whole", type=int, metavar="N", help="one job of so many pictures, at least 40")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        n, steps, shard, out = options.job
        job(int(n), int(steps), int(shard), out)
        return
    if options.whole is not None:
        if options.whole < 40:
            parser.error(f"--whole must be at least 40, not {options.whole}")
        results = whole(options.whole, options.steps, options.processes)
        print(results)
        if not options.no_record:
            print(record.write("dataset-whole", "cpu", results, options.out))
        return
    n, rounds = (4 * SHARD, 1) if options.quick else (options.n, options.rounds)

    seconds: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(rounds):
        for processes, found in seconds.items():
            found.append(measure(n, options.steps, processes)[0][0]["seconds"])
    efficiency = record.spread(
        [a / (options.processes * b) for a, b in zip(seconds[1], seconds[options.processes], strict=True)]
    )
    rows: list[dict[str, Any]] = [
        {"processes": p, "pictures_per_second": record.spread([n / s for s in found])} for p, found in seconds.items()
    ]
    growth = []
    for size in (n // 8, n // 2, 2 * n):
        jobs = [measure(size, options.steps, 1)[0][0] for _ in range(min(3, rounds))]
        each = record.spread([1000 * one["seconds"] / size for one in jobs])
        growth.append({"n": size, "ms_per_picture": each, "peak_mb": max(one["peak_mb"] for one in jobs)})
    for row in (*rows, {"efficiency": efficiency}, *growth):
        print(row)
    if not options.no_record:
        results = {"model": "emoji-32", "steps": options.steps, "batch": BATCH, "shard": SHARD, "n": n, "jobs": rows}
        print(record.write("dataset", "cpu", {**results, "efficiency": efficiency, "growth": growth}, options.out))


if __name__ == "__main__":
    main()

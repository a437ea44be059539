"""What a long job costs: how much faster two processes are than one, and what a picture and the memory take as n grows.

    python benchmarks/bench_dataset.py     # into benchmarks/results/<machine>/dataset.json
    python benchmarks/bench_dataset.py --quick --no-record

Every process has one thread, draws emoji with the bundled model, and has drawn some before the clock starts. Jobs of
one process and of several run in turn, so that a machine that slows down slows them all. Efficiency is the pictures a
second that each of several processes makes, over those that one makes alone."""

from __future__ import annotations

import argparse
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
MARK = "job: "  # in front of what a job says of itself: torchrun prints as well


def job(n: int, steps: int, out: str) -> None:
    """What each process of a job does."""
    import torch.distributed as dist

    emoji = diffkern.load("emoji-32")
    table = diffkern.make_table("dpmpp_2m", emoji.schedule, steps)
    labels = list(range(len(emoji.labels)))
    diffkern.sample(emoji.model, table, BATCH, labels=labels[0])
    dist.init_process_group("gloo")
    dist.barrier()
    done = diffkern.sample_dataset(
        emoji.model, table, n, out=out, labels=labels, shard_size=SHARD, batch_size=BATCH, progress=False
    )
    if dist.get_rank() == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(MARK + json.dumps({"n": n, "seconds": done.seconds, "peak_mb": round(peak, 1)}), flush=True)


def measure(n: int, steps: int, processes: int) -> dict[str, Any]:
    """A job of so many processes: its seconds, and the most memory that its first process took."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
             __file__, "--job", str(n), str(steps), str(Path(scratch) / "out")],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not said:
        raise RuntimeError(done.stderr)
    return json.loads(said[-1][len(MARK) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=512, help="pictures of a job (default 512)")
    parser.add_argument("--steps", type=int, default=4, help="of DPM-Solver++ 2M (default 4)")
    parser.add_argument("--processes", type=int, default=2, help="that are compared with one (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="jobs of each kind (default 5)")
    parser.add_argument("--quick", action="store_true", help="a few pictures, to see that it runs")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the records")
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(int(options.job[0]), int(options.job[1]), options.job[2])
        return
    n, rounds = (4 * SHARD, 1) if options.quick else (options.n, options.rounds)

    seconds: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(rounds):
        for processes, found in seconds.items():
            found.append(measure(n, options.steps, processes)["seconds"])
    efficiency = record.spread(
        [a / (options.processes * b) for a, b in zip(seconds[1], seconds[options.processes], strict=True)]
    )
    rows: list[dict[str, Any]] = [
        {"processes": p, "pictures_per_second": record.spread([n / s for s in found])} for p, found in seconds.items()
    ]
    growth = []
    for size in (n // 8, n // 2, 2 * n):
        jobs = [measure(size, options.steps, 1) for _ in range(min(3, rounds))]
        each = record.spread([1000 * one["seconds"] / size for one in jobs])
        growth.append({"n": size, "ms_per_picture": each, "peak_mb": max(one["peak_mb"] for one in jobs)})
    for row in (*rows, {"efficiency": efficiency}, *growth):
        print(row)
    if not options.no_record:
        results = {"model": "emoji-32", "steps": options.steps, "batch": BATCH, "shard": SHARD, "n": n, "jobs": rows}
        print(record.write("dataset", "cpu", {**results, "efficiency": efficiency, "growth": growth}, options.out))


if __name__ == "__main__":
    main()

"""Kills the processes of `diffkern sample --format` at random moments, and counts what is lost: nothing may be.

    python benchmarks/kill_test.py                   # one process, 50 kills, then two, of which one at a time is killed
    python benchmarks/kill_test.py --processes 8

Every process is a fork of this one, so that a kill costs no start of Python. Several meet in a store as under torchrun;
the one that was killed is started again, as on a host that comes back. When a job is finished it is compared, byte by
byte, with one that was left alone, and the next begins."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which PyTorch reads when a model is made: here once for all processes
import torch.distributed as dist

from diffkern import claims, cli

LEASE = 1.0  # seconds


def start(command: list[str], log: Path, env: dict[str, str]) -> int:
    """A process that runs the command line. Returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(env)
        torch.set_num_threads(1)
        claims.LEASE = LEASE
        code = cli.main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a dataset but where it was begun."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("manifest.json", ".lock")}


class Job:
    """The processes of one job."""

    def __init__(self, command: list[str], log: Path, processes: int, number: int) -> None:
        self.command, self.log, self.processes, self.number = command, log, processes, number
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        self.running = {self._start(rank): rank for rank in range(processes)}

    def _start(self, rank: int) -> int:
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": self.store.port, "TORCHELASTIC_RUN_ID": self.number,
               "TORCHELASTIC_USE_AGENT_STORE": True} if self.processes > 1 else {}  # fmt: skip
        return start(self.command, self.log, {name: str(value) for name, value in env.items()})

    def until(self, moment: float) -> bool:
        """Wait. Whether all processes have ended by then. Raises RuntimeError if one failed."""
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                del self.running[pid]
                if status:
                    code = os.waitstatus_to_exitcode(status)
                    raise RuntimeError(f"a process ended with {code}:\n{self.log.read_text()}")
            elif time.monotonic() > moment:
                return False
            else:
                time.sleep(0.002)
        return True

    def kill_one(self, chance: random.Random) -> None:
        """Kill one process, and start it again."""
        pid = chance.choice(sorted(self.running))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        rank = self.running.pop(pid)
        self.running[self._start(rank)] = rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", default="emoji-32")
    parser.add_argument("--format", default="npz")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    command = ["sample", "--model", options.model, "--steps", "2", "-n", "46", "--shard-size", "4", "--batch-size", "2",
               "--device", "cpu", "--format", options.format]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        whole, out = Path(scratch) / "whole", Path(scratch) / "out"
        for _ in range(2):  # the first builds the native library if need be
            shutil.rmtree(whole, ignore_errors=True)
            begun = time.monotonic()
            Job([*command, "--out", str(whole)], log, 1, 0).until(begun + 600)
            alone = time.monotonic() - begun
        expected = contents(whole)
        for processes in options.processes:
            jobs = endure(command, out, log, processes, options.kills, chance, alone, expected)
            print(f"{options.kills} kills in {jobs} jobs of {processes} processes: 0 lost, 0 twice, all bytes equal")


def endure(
    command: list[str], out: Path, log: Path, processes: int, kills: int, chance: random.Random, alone: float,
    expected: dict[str, bytes],
) -> int:  # fmt: skip
    """Kill so many processes. alone: seconds that a job takes without. Returns how many jobs it took."""
    killed = number = 0
    while True:
        number += 1
        shutil.rmtree(out, ignore_errors=True)
        job = Job([*command, "--out", str(out)], log, processes, number)
        while killed < kills and not job.until(time.monotonic() + chance.uniform(0, alone)):
            job.kill_one(chance)
            killed += 1
        if not job.until(time.monotonic() + 600):
            sys.exit("a job did not end")
        found = contents(out)
        if found != expected:
            differ = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
            sys.exit(f"after {killed} kills these differ: {', '.join(sorted(differ))}")
        if killed >= kills:
            return number


if __name__ == "__main__":
    main()

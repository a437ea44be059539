"""Kills the processes of `diffkern sample --format` at random moments, and counts what is lost: nothing may be.

    python benchmarks/kill_test.py                   # one process, 50 kills, then two, then four
    python benchmarks/kill_test.py --processes 8 --out docs/kills.json
    python benchmarks/kill_test.py --processes --hosts 4    # two hosts on this machine, one is killed, 4 times

Every process is a fork of this one, so that a kill costs no start of Python. Several meet in a store as under torchrun;
one is killed at a time, and started again, as on a host that comes back, while the others go on. With the first all of
them die, as they do where torchrun's store is. When a job is finished it is compared, byte by byte, with one that was
left alone, and the next begins.

A host is torchrun with a process of its own, killed at once. Without the second one the first finishes; without the
first, where the store is, torchrun ends on the second as well, and the same command goes on."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # which PyTorch reads when a model is made: here once for all processes
import torch.distributed as dist

from diffkern import claims, cli, files, ranks
from diffkern.bench import record
from diffkern.options import at_least

N = 46  # samples of a job
LEASE = 1.0  # seconds
EQUAL = "jobs with equal bytes"
MEMBER = "member"  # in front of the command of a process that torchrun starts


def run(command: list[str]) -> int:
    """What a process does."""
    torch.set_num_threads(1)
    claims.LEASE = ranks._FAREWELL = LEASE
    return cli.main(command)


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
        code = run(command)
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

    def kill_one(self, chance: random.Random) -> int:
        """Kill one process, or all of them if it is the first, and start them again. Returns how many it killed."""
        pid = chance.choice(sorted(self.running))
        killed = dict(self.running) if self.running[pid] == 0 else {pid: self.running[pid]}
        for each in killed:
            os.kill(each, signal.SIGKILL)
        for each, rank in killed.items():
            os.waitpid(each, 0)
            del self.running[each]
            self.running[self._start(rank)] = rank
        return len(killed)


def samples(folder: Path) -> Counter[int]:
    """How often each id is in a dataset."""
    ids = [int(p.stem) for p in folder.glob("*.png")]
    for p in folder.glob("*.npz"):
        ids += np.load(p)["ids"].tolist()
    return Counter(ids)


def compare(out: Path, expected: dict[str, bytes]) -> dict[str, int]:
    """A dataset with one that was left alone."""
    ids, found = samples(out), contents(out)
    if differ := [name for name in {**found, **expected} if found.get(name) != expected.get(name)]:
        print(f"these differ: {', '.join(sorted(differ))}", file=sys.stderr)
    return {"lost": N - len(ids), "twice": ids.total() - len(ids), EQUAL: int(not differ)}


def main() -> int:
    if sys.argv[1:2] == [MEMBER]:
        return run(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--hosts", type=int, default=0, metavar="N", help="kill one of two hosts so many times")
    parser.add_argument("--model", default="emoji-32")
    parser.add_argument("--format", choices=("npz", "png"), default="npz")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a record, such as docs/kills.json")
    options = parser.parse_args()
    try:
        at_least(1, kills=options.kills, processes=min(options.processes, default=1))
        at_least(0, hosts=options.hosts)
        if options.out is not None:
            files.check_writable(options.out)  # known before minutes of work
    except ValueError as e:
        parser.error(str(e))
    machine = record.machine()  # now: whoever edits the sources meanwhile changes nothing of what runs
    chance = random.Random(options.seed)
    command = ["sample", "--model", options.model, "--steps", "2", "-n", str(N), "--shard-size", "4",
               "--batch-size", "2", "--device", "cpu", "--format", options.format]  # fmt: skip
    rows: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        rows.append(row)
        print(", ".join(f"{name}: {value}" for name, value in row.items()), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        whole, out = Path(scratch) / "whole", Path(scratch) / "out"
        for _ in range(2):  # the first builds the native library if need be
            shutil.rmtree(whole, ignore_errors=True)
            begun = time.monotonic()
            try:
                Job([*command, "--out", str(whole)], log, 1, 0).until(begun + 600)
            except RuntimeError as e:
                parser.error(f"a job that nobody kills fails: {str(e).splitlines()[-1]}")
            alone = time.monotonic() - begun
        expected = contents(whole)
        for processes in options.processes:
            note(**endure(command, out, log, processes, options.kills, chance, alone, expected))
        if options.hosts:
            note(**lose_hosts([*command, "--out", str(out)], out, log, options.hosts, chance, alone, expected))
    if options.out is not None:
        value = {"machine": machine, "model": options.model, "samples of a job": N, "runs": rows}
        files.replace(options.out, (json.dumps(value, indent=1) + "\n").encode())
    return int(any(row[EQUAL] != row["jobs"] for row in rows))


def endure(
    command: list[str], out: Path, log: Path, processes: int, kills: int, chance: random.Random, alone: float,
    expected: dict[str, bytes],
) -> dict[str, Any]:  # fmt: skip
    """Kill so many processes. alone: seconds that a job takes without."""
    killed = jobs = 0
    found: Counter[str] = Counter()
    while killed < kills:
        jobs += 1
        shutil.rmtree(out, ignore_errors=True)
        job = Job([*command, "--out", str(out)], log, processes, jobs)
        while killed < kills and not job.until(time.monotonic() + chance.uniform(0, alone)):
            killed += job.kill_one(chance)
        if not job.until(time.monotonic() + 600):
            raise RuntimeError(f"a job did not end:\n{log.read_text()}")
        found.update(compare(out, expected))
    return {"processes": processes, "kills": killed, "jobs": jobs, **found}


class Host:
    """torchrun with one process, in a job of two hosts."""

    def __init__(self, command: list[str], log: Path, port: int, first: bool) -> None:
        self.log = log
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-conf", f"is_host={first}",
                 "--rdzv-endpoint", f"localhost:{port}", __file__, MEMBER, *command]  # fmt: skip
        with log.open("w") as file:
            torchrun = [sys.executable, "-m", "torch.distributed.run", *words]
            self.agent = subprocess.Popen(torchrun, stdout=file, stderr=file)

    def kill(self) -> None:
        pid = self.agent.pid
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, workers)):
            os.kill(each, signal.SIGKILL)
        self.agent.wait()

    def until_it_says(self, words: str) -> None:
        """torchrun itself goes on for minutes: it waits for the other host."""
        end = time.monotonic() + 300
        while words not in self.log.read_text():
            if time.monotonic() > end:
                raise RuntimeError(f"a host does not say {words!r}:\n{self.log.read_text()}")
            time.sleep(0.1)


def lose_hosts(
    command: list[str], out: Path, log: Path, kills: int, chance: random.Random, alone: float,
    expected: dict[str, bytes],
) -> dict[str, Any]:  # fmt: skip
    """Kill one of two hosts so many times, the second and the first in turn."""
    found: Counter[str] = Counter()
    for job in range(kills):
        shutil.rmtree(out, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        hosts = [Host(command, log.with_name(f"host-{i}"), port, first=i == 0) for i in range(2)]
        while not list(out.glob("shard-*.json")):
            if any(host.agent.poll() is not None for host in hosts):
                raise RuntimeError(f"a host did not start:\n{hosts[0].log.read_text()}\n{hosts[1].log.read_text()}")
            time.sleep(0.01)
        time.sleep(chance.uniform(0, alone / 3))
        if job % 2:
            hosts[0].kill()
            hosts[1].agent.wait(timeout=300)
            Job(command, log, 1, 0).until(time.monotonic() + 600)
        else:
            hosts[1].kill()
            hosts[0].until_it_says("shards, checked")
            hosts[0].kill()
        found.update(compare(out, expected))
    return {"hosts": 2, "kills": kills, "jobs": kills, **found}


if __name__ == "__main__":
    sys.exit(main())

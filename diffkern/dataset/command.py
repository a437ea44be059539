"""`diffkern sample --format`: a dataset in shards, by one process or by those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from diffkern.dataset import job, manifest
from diffkern.dataset.plan import Plan
from diffkern.dataset.ranks import is_launched, of_this_process
from diffkern.stop import Stopped, on_signals

OUT = Path("samples")


def device_of_rank(device: torch.device) -> torch.device:
    """The GPU of this process, one each, where torchrun started it. Raises ValueError if there are too few."""
    if not is_launched() or device.type != "cuda":
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise ValueError(f"process {local} of this host has no GPU of its own: --nproc-per-node can be {there} at most")
    return torch.device("cuda", local)


def sample(plan: Plan, out: Path, kind: str, size: int, header: Iterable[str]) -> None:
    """Make the dataset. header: lines to say first. Raises what `sample_dataset` raises, and Stopped, with what is
    kept, after a signal; in processes of torchrun but the first SystemExit, so that all is said once."""
    rank, _ = of_this_process()
    if not rank:
        print(*header, sep="\n", flush=True)
    try:
        with on_signals(None if rank else "diffkern sample: stopping after this shard; again to stop at once") as stop:
            done = job.write(plan, out, kind, size, pause=stop.pause)
    except Stopped as e:
        if rank:
            raise SystemExit(e.code) from None
        e.args = (_kept(plan, out, size),)
        raise
    except ConnectionError as e:
        raise ValueError(f"{e}; {_kept(plan, out, size)}") from None
    except OSError as e:
        raise OSError(e.errno, f"{e.strerror}; {_kept(plan, out, size)}", e.filename or str(out)) from None
    except ValueError:
        if rank:
            raise SystemExit(2) from None
        raise
    if not rank:
        made, on = done.n - done.kept, f" by {done.processes} processes" if done.processes > 1 else ""
        rate = f", {made / done.seconds:.2f} pictures a second{on}" if made else ""
        kept = f", {done.kept} pictures were there before" if done.kept else ""
        print(f"{done.seconds:.2f} s{rate}{kept}")
        print(
            f"{out}: {done.n} pictures in {done.shards} shards, checked; {manifest.NAME} says what they were made with"
        )


def _kept(plan: Plan, out: Path, size: int) -> str:
    """What a job leaves that ends early."""
    shards = len(list(out.glob("shard-*.json")))
    return f"{out} keeps {shards} of {-(-plan.n // size)} shards: the same command goes on from there"

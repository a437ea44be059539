"""`diffkern sample --format`: a dataset in shards, by one process or by those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffkern.dataset import job, manifest
from diffkern.dataset.plan import Plan
from diffkern.ranks import of_this_process
from diffkern.stop import Stopped, on_signals

OUT = Path("samples")


def sample(plan: Plan, out: Path, kind: str, size: int, header: Iterable[str]) -> None:
    """Make the dataset. header: lines to say first. Raises what `sample_dataset` raises, and Stopped, with what is
    kept, after a signal."""
    rank, _ = of_this_process()
    if not rank:
        print(*header, sep="\n", flush=True)
    try:
        with on_signals(None if rank else "diffkern sample: stopping after this shard; again to stop at once") as stop:
            done = job.write(plan, out, kind, size, pause=stop.pause)
    except Stopped as e:
        e.args = (_kept(plan, out, size),)
        raise
    except ConnectionError as e:
        raise ValueError(f"{e}; {_kept(plan, out, size)}") from None
    except OSError as e:
        raise OSError(e.errno, f"{e.strerror}; {_kept(plan, out, size)}", e.filename or str(out)) from None
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

"""`diffkern.sample_dataset`: many pictures, batch after batch, or in shards that any number of processes make."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from diffkern import files
from diffkern.claims import Claims
from diffkern.dataset import manifest
from diffkern.dataset.plan import Plan
from diffkern.dataset.shards import FORMATS, OWN, Folder
from diffkern.progress import progress_bar
from diffkern.ranks import Ranks, SaidByFirst, join, of_this_process
from diffkern.samplers.step import Model
from diffkern.samplers.table import Table
from diffkern.schedules import one_of

LOCK = ".lock"


class Written(NamedTuple):
    """A finished dataset: n samples in a folder, of which `kept` were there before; seconds and processes it took."""

    path: Path
    n: int
    shards: int
    kept: int
    seconds: float
    processes: int


@overload
def sample_dataset(
    model: Model, table: Table, n: int, *, out: None = None, shape: tuple[int, ...] | None = ..., seed: int = ...,
    labels: int | Sequence[int] | None = ..., guidance: float | None = ..., null_label: int | None = ...,
    decode: Callable[[Tensor], Tensor] | None = ..., batch_size: int = ..., batch_invariant: bool = ...,
    progress: bool | None = ...,
) -> Iterator[tuple[Tensor, Tensor]]: ...  # fmt: skip
@overload
def sample_dataset(
    model: Model, table: Table, n: int, *, out: str | os.PathLike[str], format: str = ..., shard_size: int = ...,
    shape: tuple[int, ...] | None = ..., seed: int = ..., labels: int | Sequence[int] | None = ...,
    guidance: float | None = ..., null_label: int | None = ..., decode: Callable[[Tensor], Tensor] | None = ...,
    batch_size: int = ..., batch_invariant: bool = ..., progress: bool | None = ...,
) -> Written: ...  # fmt: skip


def sample_dataset(
    model: Model,
    table: Table,
    n: int,
    *,
    out: str | os.PathLike[str] | None = None,
    format: str = "npz",
    shard_size: int = 512,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    labels: int | Sequence[int] | None = None,
    guidance: float | None = None,
    null_label: int | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    batch_invariant: bool = False,
    progress: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]] | Written:
    """Draw samples 0 to n - 1 of a seed, in memory that does not grow with n.

    model, table, shape, seed, guidance, null_label, progress: as for `diffkern.sample`. labels: one for all, or several
    that the samples have in turn. decode: what makes pictures [B, C, H, W] on [-1, 1] of the samples, as a VAE's
    `to_pictures`. batch_invariant: draw under `diffkern.batch_invariant()`; then the batch size changes no bit.

    Without `out` an iterator over batches: sample ids int64 [B], and samples float32 [B, *shape], or what decode makes
    of them. Under torchrun every process gets a part of the batches.

    out: a folder, where samples are written as pictures, shard_size of them in a shard. format: "npz" has arr_0 uint8
    [n, H, W, C], ids int64 [n] and labels int64 [n] if there are any; "png" a PNG for each sample; "tar" PNGs and
    labels in a tar, as webdataset reads it. manifest.json says what they were made with. Started again, it keeps whole
    shards and makes the others. Under torchrun the processes share the shards out among themselves: call it in all of
    them; on several hosts the folder has to be on a file system that they share. Returns what was written.

    Raises ValueError for arguments that do not fit together, for a folder that is of a dataset with other settings, or
    that another job is writing to, OSError if the disk fails, ConnectionError if the store of torchrun is lost. Whole
    shards are kept, whatever is raised."""
    plan = Plan(
        model, table, n, shape, seed, labels, guidance, null_label, decode, batch_size, batch_invariant
    )  # fmt: skip
    plan.check()
    if out is None:
        return _batches(plan, progress)
    return write(plan, Path(out), format, shard_size, progress=progress)


def _batches(plan: Plan, progress: bool | None) -> Iterator[tuple[Tensor, Tensor]]:
    rank, world = of_this_process()
    mine = list(plan.batches(range(plan.n)))[rank::world]
    with progress_bar(progress, total=sum(map(len, mine)), desc=plan.table.name, unit="picture") as bar:
        for ids in mine:
            yield torch.arange(ids.start, ids.stop), plan.draw(ids)
            bar.update(len(ids))


def write(
    plan: Plan, out: Path, kind: str, size: int, *, progress: bool | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Written:  # fmt: skip
    """As `sample_dataset`. pause: called before every shard, and while this process waits for others; raises whatever
    ends the job there."""
    one_of("format", kind, FORMATS)
    if size < 1:
        raise ValueError(f"shard_size must be at least 1, not {size}")
    settings = {**plan.settings(), "format": kind, "shard size": size}
    folder = Folder(out, kind, plan.n, size, manifest.digest(settings))
    start = time.perf_counter()
    with join(pause) as ranks, _opened(ranks, out, settings, plan.device, pause):
        bar = _Bar(ranks, plan, progress)

        def wait() -> None:
            bar.show()
            pause()

        claims = Claims(ranks.store, [str(shard) for shard in range(len(folder))], idle=wait)
        with bar:
            for shard in claims:
                wait()
                _make(plan, folder, shard, claims, bar)
        kept = ranks.store.add("kept", 0)
        if ranks.rank == 0:
            _check(folder)
    if ranks.rank == 0:
        files.remove_leftovers(out, OWN)
    return Written(out, plan.n, len(folder), kept, time.perf_counter() - start, ranks.world)


@contextmanager
def _opened(
    ranks: Ranks, out: Path, settings: dict[str, Any], device: torch.device, pause: Callable[[], None]
) -> Iterator[None]:
    """The folder with its manifest: rank 0 makes and locks it, the others see that it is there and theirs."""
    if ranks.rank:
        while not ranks.store.check(["opened"]):
            pause()
            time.sleep(0.1)
        if said := ranks.store.get("opened").decode():
            raise SaidByFirst(said)
        if not (out / manifest.NAME).is_file():
            raise ValueError(f"rank 0 wrote {out / manifest.NAME}, and it is not here: all hosts must share the folder")
        manifest.check(out, settings)
        yield
        return
    with ExitStack() as stack:
        try:
            files.check_folder(out)
            out.mkdir(parents=True, exist_ok=True)
            stack.callback(_lock(out).release)
            if (out / manifest.NAME).exists():
                manifest.check(out, settings)
            else:
                manifest.write(out, settings, device)
        except (OSError, ValueError) as e:
            ranks.store.set("opened", str(e))
            raise
        ranks.store.set("opened", "")
        yield


def _lock(out: Path) -> FileLock:
    """Held for the time of a job. The system lets go of it when the process dies, however it does."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another job is writing to {out}: wait for its end, or give another folder") from None
    except NotImplementedError:
        warnings.warn(f"{out} is on a file system without locks: see that one job at a time writes to it", stacklevel=2)
    return lock


def _make(plan: Plan, folder: Folder, shard: int, claims: Claims, bar: _Bar) -> None:
    """Make a shard, unless it is there."""
    ids = folder.ids(shard)
    kept = folder.is_whole(shard)
    if not kept:

        def sign(done: int) -> bool:
            bar.show(done)
            return claims.is_wanted()

        pixels = plan.shard(ids, sign)
        if pixels is None:  # another process was faster
            return
        if folder.kind != "npz" and pixels.shape[-1] not in (1, 3):
            raise ValueError(f"a picture of {pixels.shape[-1]} channels is no {folder.kind}: give npz, or decode")
        labels = plan.labels_of(ids)
        folder.write(shard, pixels, None if labels is None else np.array(labels))
    if claims.is_first(shard):
        bar.count(len(ids), kept)
    claims.done(shard)


def _check(folder: Folder) -> None:
    """Raise ValueError if a shard is not as it was written."""
    broken = [shard for shard in range(len(folder)) if not folder.is_whole(shard)]
    if broken:
        names = ", ".join(folder.names(shard)[0] for shard in broken[:3])
        raise ValueError(
            f"{len(broken)} shards of {folder.path} were changed while the job ran, {names} first: start it again"
        )


class _Bar:
    """The samples of all processes, in rank 0. Those that were there before count as done, and not for the time that is
    left."""

    def __init__(self, ranks: Ranks, plan: Plan, progress: bool | None) -> None:
        self.store = ranks.store
        self.bar = progress_bar(
            False if ranks.rank else progress, total=plan.n, desc=plan.table.name, unit="picture", smoothing=0
        )

    def __enter__(self) -> None:
        self.bar.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.bar.__exit__(*raised)

    def count(self, n: int, kept: bool) -> None:
        self.store.add("kept", n * kept)
        self.store.add("samples", n)
        self.show()

    def show(self, more: int = 0) -> None:
        """more: samples of the shard that this process is at."""
        if not self.bar.disable:
            self.bar.initial = self.store.add("kept", 0)
            self.bar.update(max(0, self.store.add("samples", 0) + more - self.bar.n))

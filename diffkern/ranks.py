"""The processes of a job: one, or those that torchrun started. They meet in torchrun's store and nowhere else: pictures
need no sum over processes, so that there is no collective in which a lost one could hold the others up."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from threading import Event, Thread
from typing import Any, NamedTuple

import torch

_calls = count()  # of `join`, in step in all processes: what one job left in the store is not the next one's
_ANSWER = 0.1  # seconds between two looks at who asks
_OVER = "over"
_FAREWELL = 30.0  # seconds


class SaidByFirst(ValueError):
    """The first process of a job has refused it, and says why."""


class Ranks(NamedTuple):
    """store: of torch.distributed, with the keys of one job. rank: of this process, of so many."""

    store: Any
    rank: int
    world: int


def is_launched() -> bool:
    """Whether torchrun started this process."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_torchelastic_launched()


def of_this_process() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if is_launched() else (0, 1)


def gpu_of_this_process(there: int) -> int:
    """The number of the GPU that is this process's own, of those that are there; under torchrun it becomes the current
    one. Raises ValueError if there are too few."""
    if not is_launched():
        return 0
    local = int(os.environ["LOCAL_RANK"])
    if local >= there:
        raise ValueError(f"process {local} of this host has no GPU of its own: --nproc-per-node can be {there} at most")
    torch.cuda.set_device(local)
    return local


@contextmanager
def join(pause: Callable[[], None] = lambda: None) -> Iterator[Ranks]:
    """The processes of a job, for its time. pause: called while this one waits for the first; raises whatever ends the
    job there. Raises ConnectionError if their store is lost meanwhile."""
    import torch.distributed as dist

    if not is_launched():
        yield Ranks(dist.HashStore(), 0, 1)
        return
    try:
        store, rank, world = next(iter(dist.rendezvous("env://")))
        with _together(dist.PrefixStore(f"diffkern/{next(_calls)}", store), rank, pause) as own:
            ranks = Ranks(own, rank, world)
            yield ranks
            _part(ranks)
    except (dist.DistNetworkError, dist.DistStoreError):
        raise ConnectionError("the store of torchrun is lost") from None


@contextmanager
def _together(store: Any, rank: int, pause: Callable[[], None]) -> Iterator[Any]:
    """A store of those alone that torchrun started together. Its own outlives them, and how often it started them again
    every host counts for itself: so the first process names each start, and answers all who ask for the name."""
    import torch.distributed as dist

    if rank:
        keys = [f"answer {store.add('questions', 1)}", _OVER]
        while not (there := [key for key in keys if store.check([key])]):
            pause()
            time.sleep(_ANSWER)
        yield dist.PrefixStore(store.get(there[0]).decode(), store)
        return
    name, ended = uuid.uuid4().hex, Event()

    def answer() -> None:
        answered = 0
        with suppress(dist.DistNetworkError, dist.DistStoreError):
            while not ended.wait(_ANSWER):
                for question in range(answered + 1, store.add("questions", 0) + 1):
                    store.set(f"answer {question}", name)
                    answered = question

    thread = Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield dist.PrefixStore(name, store)
        store.set(_OVER, name)  # who comes later finds all done
    finally:
        ended.set()
        thread.join()


def _part(ranks: Ranks) -> None:
    """The store may live in rank 0, which leaves last, or when the others have had the time."""
    ranks.store.set(f"parted {ranks.rank}", "")
    all_of_them = [f"parted {rank}" for rank in range(ranks.world)]
    until = time.monotonic() + _FAREWELL
    while ranks.rank == 0 and not ranks.store.check(all_of_them) and time.monotonic() < until:
        time.sleep(0.05)

"""Who makes which part of a job: claims in the store of torch.distributed, where the workers of a job meet.

A part's key holds nothing, or its worker's last sign of life, or that it is done. All changes are compare-and-set, so
that one worker at most takes a part. Parts are handed out in order; a worker that finds none left looks at those that
are not done. One whose worker gave no sign of life for LEASE seconds, measured by the clock of the one that looks,
which no change of the time of day touches, it takes over. A worker that was only slow goes on: that two make one part
must do no harm, and the first to finish it tells the other."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

LEASE = 60.0
_SIGNS = 6  # of life in a lease, at most
_DONE = "done"


class Claims:
    """One worker's view. names: of the parts, the same in every worker. idle: called while the worker waits for parts
    of others, twice a second."""

    def __init__(
        self, store: Any, names: Sequence[str], idle: Callable[[], None], lease: float | None = None
    ) -> None:  # fmt: skip
        self.store, self.names, self.idle = store, names, idle
        self.lease = LEASE if lease is None else lease
        self.left = set(range(len(names)))  # not known to be done
        self._name, self._beats = uuid.uuid4().hex, count()
        self._seen: dict[int, tuple[str, float]] = {}  # others' last signs of life, and since when they are the last
        self._held = (-1, "", 0.0)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the parts that this worker is to make, each claimed, until every part is done by whomever. The
        worker says `done` of each before it takes the next."""
        while (part := self.store.add("next", 1) - 1) < len(self.names):
            if self._claim(part):
                yield part
        while self.left:
            for part in sorted(self.left):
                if self._claim(part):
                    yield part
            if self.left:
                self.idle()
                time.sleep(min(0.5, self.lease / _SIGNS))

    def is_wanted(self) -> bool:
        """Give a sign of life. False if another worker has finished the part meanwhile."""
        part, last, at = self._held
        now = time.monotonic()
        if now - at < self.lease / _SIGNS:
            return True
        mine = self._sign()
        found = self._swap(part, last, mine)
        self._held = (part, mine if found == mine else last, now)
        return found != _DONE

    def is_first(self, part: int) -> bool:
        """Whether this worker is the first to ask this of the part: each part is counted once."""
        return self.store.add(f"asked {self.names[part]}", 1) == 1

    def done(self, part: int) -> None:
        """Say that a part is made, and where all can see it."""
        self.store.set(f"part {self.names[part]}", _DONE)
        self.left.discard(part)

    def _claim(self, part: int) -> bool:
        mine, now = self._sign(), time.monotonic()
        found = self._swap(part, "", mine)
        if found == _DONE:
            self.left.discard(part)
        elif found != mine:
            last, since = self._seen.get(part, ("", now))
            if found != last:
                self._seen[part] = (found, now)
            elif now - since >= self.lease:
                found = self._swap(part, found, mine)
        if found == mine:
            self._held = (part, mine, now)
        return found == mine

    def _sign(self) -> str:
        return f"{self._name} {next(self._beats)}"

    def _swap(self, part: int, expected: str, desired: str) -> str:
        """What the key holds after it was set to `desired` if it held `expected`."""
        return self.store.compare_set(f"part {self.names[part]}", expected, desired).decode()

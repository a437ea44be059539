"""The parts of a run: a few pictures by one method each. Any process scores them, and the first puts the scores
together in order, so that its record is at any time what one process alone would have."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from diffkern.identity import changes
from diffkern.likelihood.record import Entry, Record
from diffkern.ranks import Ranks


class Part(NamedTuple):
    """Pictures start to stop of a set, by one method."""

    data: str
    method: str
    start: int
    stop: int

    @property
    def pictures(self) -> range:
        return range(self.start, self.stop)

    @property
    def name(self) -> str:
        return json.dumps(self)


class Parts:
    """What is left of a run: todo, the same in all processes, which are told it by the first."""

    def __init__(self, ranks: Ranks, record: Record, todo: Sequence[Part], pause: Callable[[], None]) -> None:
        """todo: of the first process. pause: called while another waits for it. Raises ValueError in another that
        has other settings."""
        self.store, self.record = ranks.store, record
        if ranks.rank == 0:
            self.store.set("parts", json.dumps([record.settings, todo]))
        while not self.store.check(["parts"]):
            pause()
            time.sleep(0.1)
        settings, parts = json.loads(self.store.get("parts"))
        if differ := changes(settings, record.settings):
            raise ValueError(f"process {ranks.rank} differs from the first, which has {' and '.join(differ)}")
        self.todo = [Part(*part) for part in parts]
        self._coming = self.todo if ranks.rank == 0 else []
        self._entries = {(e.data, e.method): e for e in record.entries}

    def put(self, part: Part, entry: Entry) -> None:
        """entry: of this part alone."""
        self.store.set(f"scores of {part.name}", json.dumps(entry.to_json()))

    def gather(self) -> None:
        """Add to the record of the first process what is there by now."""
        while self._coming and self.store.check([key := f"scores of {self._coming[0].name}"]):
            part, *self._coming = self._coming
            found = Entry.from_json(json.loads(self.store.get(key)))
            assert found.likelihood is not None
            self._entries[part.data, part.method].add(found.likelihood, found.seconds, found.evaluations)
            self.record.save(now=False)

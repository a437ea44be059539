"""How a long command is stopped: the first Ctrl-C or SIGTERM asks it to come to an end, the second ends it at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """code: the exit code that says which signal it was, 128 and its number."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class Stop:
    """What was asked for so far."""

    def __init__(self) -> None:
        self.code = 0

    def pause(self) -> None:
        """Raise Stopped if it was asked for: called where a command can end well."""
        if self.code:
            raise Stopped(self.code)


@contextmanager
def on_signals(say: str | None) -> Iterator[Stop]:
    """For the time of a command. say: written when the first signal comes."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.code:
            raise Stopped(128 + number)
        stop.code = 128 + number
        if say is not None:
            print(say, file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

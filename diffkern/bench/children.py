"""Work given out to child processes, an item at a time: what kills one, such as a kernel that reads outside its memory,
costs that item alone, and what takes too long is ended."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_MARK = "answer: "  # in front of an answer: libraries print as well


class Failure(str):
    """Why an item has no answer."""


def serve(answer: Callable[[Any], Any]) -> None:
    """The child's side: answer the items that come in, until there are none."""
    for line in sys.stdin:
        print(_MARK + json.dumps(answer(json.loads(line))), flush=True)


def answers(
    command: Sequence[object], items: Sequence[Any], processes: int, until: float, each: float
) -> Iterator[tuple[Any, Any]]:
    """(item, answer) for every item, as they come, from processes that run this Python with `command`. An answer is a
    Failure if the child died of the item, took longer than `each` seconds, or had not begun by `until`, in
    time.monotonic seconds."""
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def work() -> None:
        child = None
        try:
            while True:
                item = todo.get_nowait()
                if (left := until - time.monotonic()) <= 0:
                    done.put((item, Failure("no time was left")))
                    continue
                child = child or Child(command)
                answer = child.ask(item, min(each, left))
                if isinstance(answer, Failure):
                    child.end()
                    child = None
                done.put((item, answer))
        except queue.Empty:
            pass
        finally:
            if child is not None:
                child.end()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(processes, len(items)))]
    for worker in workers:
        worker.start()
    for _ in items:
        yield done.get()
    for worker in workers:
        worker.join()


def environment() -> dict[str, str]:
    """That of a process which imports what this one does, also where this one finds it from the folder it is in."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}


def reason(code: int, printed: str) -> str:
    """Why a process ended, from its exit code and what it printed as errors: the last error that it names."""
    lines = printed.splitlines()
    errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
    return errors[-1] if errors else f"exit {code}: {lines[-1] if lines else 'it said nothing'}"


class Child:
    """A process that runs this Python with `command`, and answers what it is asked. more: variables of its
    environment."""

    def __init__(self, command: Sequence[object], more: Mapping[str, str] | None = None) -> None:
        # Unlike a pipe, a file does not fill up.
        self.errors = tempfile.NamedTemporaryFile("w+", prefix="diffkern-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**environment(), **(more or {})},
        )  # fmt: skip
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(_MARK):
                self.lines.put(line[len(_MARK) :])
        self.lines.put(None)

    def ask(self, item: Any, seconds: float) -> Any:
        """The answer; or a Failure, after which there are no more."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(item) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return Failure(f"took longer than {seconds:.0f} s")
        except OSError:
            line = None
        return Failure(self._reason()) if line is None else json.loads(line)

    def _reason(self) -> str:
        code = self.process.wait()
        return reason(code, Path(self.errors.name).read_text(encoding="utf-8", errors="replace"))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

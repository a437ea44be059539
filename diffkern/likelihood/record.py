"""The file of a run: what was asked, and the score of every picture so far. It is result and state in one: the same
run, started again, goes on from it, and it has "complete" once nothing is left to do.

Every number is written so that it is read back to the bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern import files
from diffkern.identity import changes
from diffkern.likelihood.result import Likelihood

FORMAT = "diffkern likelihood 1"
# Of the time of a run at most this share goes into writing the file.
SHARE = 0.05


@dataclass
class Entry:
    """How one method scored the pictures of one set: the first len(likelihood) of `pictures`."""

    data: str
    method: str
    pictures: int
    likelihood: Likelihood | None = None
    seconds: float = 0.0
    evaluations: int = 0  # of the model, each of one x_t

    @property
    def done(self) -> int:
        return 0 if self.likelihood is None else len(self.likelihood)

    @property
    def complete(self) -> bool:
        return self.done == self.pictures

    def add(self, part: Likelihood, seconds: float, evaluations: int) -> None:
        self.likelihood = part if self.likelihood is None else Likelihood.joined([self.likelihood, part])
        self.seconds += seconds
        self.evaluations += evaluations

    def noise(self) -> float:
        """The standard error of the average bits per dimension that comes from Monte-Carlo noise alone."""
        assert self.likelihood is not None
        return self.likelihood.bits_per_dim_stderr.square().sum().sqrt().item() / self.done

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"data": self.data, "method": self.method, "pictures": self.pictures}
        value |= {"scored": self.done, "seconds": round(self.seconds, 3), "evaluations": self.evaluations}
        if (found := self.likelihood) is not None:
            mean, error = found.average()
            value |= {"bits_per_dim": mean, "standard_error": _number(error), "noise": _number(self.noise())}
            value |= {"dims": found.dims, "log_p": found.log_p.tolist(), "stderr": [_number(s) for s in found.stderr]}
            value["terms"] = {name: term.tolist() for name, term in found.terms.items()}
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Entry:
        entry = cls(value["data"], value["method"], value["pictures"])
        if value["scored"]:
            log_p, terms = _tensor(value["log_p"]), {name: _tensor(term) for name, term in value["terms"].items()}
            entry.add(
                Likelihood(log_p, _tensor(value["stderr"]), value["dims"], entry.method, terms),
                float(value["seconds"]),
                int(value["evaluations"]),
            )
            if {len(entry.likelihood.stderr), *map(len, terms.values())} != {entry.done}:  # type: ignore[union-attr]
                raise ValueError("of another length")
        if not entry.done == value["scored"] <= entry.pictures:
            raise ValueError("of another length")
        return entry


@dataclass
class Record:
    """model: its name. settings: all that a figure depends on but its pictures. data: of each set by name, what tells
    its pictures from others. entries: one for each set and method."""

    path: Path
    model: str
    settings: dict[str, Any]
    data: dict[str, dict[str, Any]]
    entries: list[Entry]
    _saved: float = field(default=-math.inf, repr=False)
    _cost: float = field(default=0.0, repr=False)

    @classmethod
    def open(
        cls, path: Path, model: str, settings: dict[str, Any], data: dict[str, dict[str, Any]], methods: Sequence[str],
        restart: bool = False,
    ) -> Record:  # fmt: skip
        """The run that is kept in a file, as far as it got; a new one if there is none, or with `restart`. Sets and
        methods that are not in it yet are added. Raises ValueError if the file is of a run with other settings, is no
        such file, or cannot be written."""
        files.check_writable(path)
        record = cls(path, model, settings, {}, [])
        if path.exists() and not restart:
            record = cls._read(path)
            before = {"settings": record.settings, **record.data}
            now = {"settings": settings, **{name: data[name] for name in data if name in record.data}}
            if differ := [c for what, value in now.items() for c in _changes(what, before[what], value)]:
                raise ValueError(
                    f"{path} holds a run with {' and '.join(differ)}: give another --out, or --restart to replace it"
                )
        record.data |= data
        have = {(e.data, e.method) for e in record.entries}
        record.entries += [
            Entry(name, method, facts["pictures"])
            for name, facts in data.items()
            for method in methods
            if (name, method) not in have
        ]
        return record

    @classmethod
    def _read(cls, path: Path) -> Record:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise ValueError(value["format"])
            entries = [Entry.from_json(entry) for entry in value["results"]]
            return cls(path, value["model"], dict(value["settings"]), dict(value["data"]), entries)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{path} is damaged, or no result of this command: give another --out, or --restart to replace it"
            ) from None

    @property
    def complete(self) -> bool:
        return all(entry.complete for entry in self.entries)

    @property
    def scored(self) -> list[Entry]:
        """The entries that have a figure."""
        return [entry for entry in self.entries if entry.done]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "complete": self.complete,
            "settings": self.settings,
            "data": self.data,
            "results": [entry.to_json() for entry in self.entries],
        }

    def save(self, now: bool = True) -> None:
        """Write the file, whole or not at all. now: False leaves it to a later call if writing would take more than
        SHARE of the time."""
        start = time.monotonic()
        if now or start - self._saved > self._cost / SHARE:
            text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False)
            files.replace(self.path, (text + "\n").encode())
            self._saved = time.monotonic()
            self._cost = self._saved - start


def _changes(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    if what == "settings":
        return changes(before, now)
    keys = [key for key in (before | now) if before.get(key) != now.get(key)]  # type: ignore[operator]
    if "pictures" in keys:
        return [f"{before.get('pictures')} pictures of {what}, not {now['pictures']}"]
    return [f"other {key} of {what}" for key in keys]


def _number(value: float | Tensor) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


def _tensor(values: Any) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)

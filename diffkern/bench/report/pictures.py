"""The pictures of a report, each with a mark that says what it was drawn from."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from diffkern import plots
from diffkern.bench.report import bars, curves, roofline
from diffkern.bench.report.records import Record


class Picture(Protocol):
    """A module that draws records: the file's name, and what is said below it."""

    FILE: str
    ABOUT: str  # the first sentence is what who does not see it is told

    def data(self, records: list[Record]) -> list[Any]:
        """What is drawn and nothing else, as dataclasses; empty if there is nothing to draw."""

    def figure(self, data: list[Any]) -> Any:
        """The matplotlib figure."""


PICTURES: tuple[Picture, ...] = (bars, roofline, curves)
"""To add one, write a module like these, and list it."""

KEY = "diffkern records"  # of the PNG's text


def alt(picture: Picture) -> str:
    return picture.ABOUT.partition(". ")[0]


def digest(data: Sequence[Any]) -> str:
    """The same for the same figures, however their records are written, and whichever matplotlib draws them."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(part) for part in data]).encode()).hexdigest()


def digest_of(png: bytes) -> str | None:
    """The mark of a picture; None if it has none."""
    with Image.open(io.BytesIO(png)) as image:
        return image.info.get(KEY)


def draw(records: list[Record], kept: Path | None = None) -> dict[str, bytes]:
    """Every picture that there is something for, by its file's name. kept: a folder of pictures, of which those that
    show the same already are taken as they are. Raises ValueError if there is no matplotlib."""
    found = {}
    for picture in PICTURES:
        if not (data := picture.data(records)):
            continue
        mark, old = digest(data), kept and kept / picture.FILE
        if old and old.is_file() and digest_of(old.read_bytes()) == mark:
            found[picture.FILE] = old.read_bytes()
        else:
            found[picture.FILE] = plots.rendered(picture.figure(data), facts={KEY: mark})
    return found

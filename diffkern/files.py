"""Reads JSON, writes a file whole or not at all, and what a killed process left of one away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError if it cannot be read, or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON") from None


def check_writable(path: Path, folder: Path | None = None) -> None:
    """Raise ValueError if a file cannot be written there, before any work is done for it. folder: which must be there;
    default that of the path."""
    folder = path.parent if folder is None else folder
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a folder")
    try:  # os.access says yes on a read-only file system; only trying tells
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to replace it")


def check_folder(path: Path) -> None:
    """Raise ValueError if a folder cannot be made there, or files cannot be written into it, before any work is done
    for them."""
    place = path
    while not place.exists():
        place = place.parent
    check_writable(path, place)


def replace(path: Path, data: bytes) -> None:
    """Write data to path: a reader, and whoever looks after a crash, finds the old file or the new one. Raises OSError
    if the disk does, and leaves the old file then."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes files private; the user's mask is what a plain open would have used
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what `replace` left in a folder when it was killed, of files of such names. Nobody else may write one
    of these names meanwhile."""
    for scratch in folder.glob(".*-????????"):
        if names.fullmatch(scratch.name[1:-9]):
            with contextlib.suppress(FileNotFoundError):
                scratch.unlink()

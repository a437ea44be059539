"""What a dataset was made with: manifest.json, written before any shard. A job goes on only in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffkern import doctor, files
from diffkern.identity import changes

FORMAT = "diffkern dataset 1"
NAME = "manifest.json"


def write(folder: Path, settings: Mapping[str, Any], device: torch.device) -> None:
    """settings: all that the bytes depend on. Beside them stands on what the job was begun."""
    begun_on = {
        "device": doctor.device_name(device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "pillow")}},
    }
    text = json.dumps({"format": FORMAT, "settings": settings, "begun on": begun_on}, indent=1) + "\n"
    files.replace(folder / NAME, text.encode())


def check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, if a folder is of a job with other settings."""
    path = folder / NAME
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != FORMAT:
            raise ValueError(value["format"])
        before = dict(value["settings"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged, or of no dataset of diffkern: give another folder") from None
    if differ := changes(before, settings):
        raise ValueError(
            f"{folder} holds a dataset with {' and '.join(differ)}: give another folder, or the same again"
        )


def digest(settings: Mapping[str, Any]) -> str:
    """What ties a shard to the settings it was made with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

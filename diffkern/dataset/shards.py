"""The folder of a dataset: a shard for each range of sample ids, and beside it a .json that says what is in it.

The .json is written last, and tells the job and the SHA-256 of every file of its shard: a shard is whole if they agree.
Whoever makes a shard of a job writes the same bytes, so that it does no harm if two do; were they not the same after
all, what does not agree is made again."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffkern import files, pictures

FORMATS = ("npz", "png", "tar")
OWN = re.compile(r"shard-\d{5,}\.(npz|tar|json)|\d{8,}\.png|manifest\.json")  # names of what is written here


@dataclass(frozen=True)
class Folder:
    """kind: of FORMATS. n: samples in all. size: samples in a shard. job: digest of the settings."""

    path: Path
    kind: str
    n: int
    size: int
    job: str

    def __len__(self) -> int:
        """How many shards there are to be."""
        return -(-self.n // self.size)

    def ids(self, shard: int) -> range:
        """Of the samples in a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.n))

    def names(self, shard: int) -> list[str]:
        """Of the files of a shard, in order."""
        if self.kind == "png":
            return [f"{i:08d}.png" for i in self.ids(shard)]
        return [f"shard-{shard:05d}.{self.kind}"]

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there, of this job, as it was written."""
        try:
            found = json.loads(self._sidecar(shard).read_bytes())
            return found == self._contents(shard, [_sha256(self.path / name) for name in self.names(shard)])
        except (OSError, ValueError, RecursionError):
            return False

    def write(self, shard: int, pixels: np.ndarray, labels: np.ndarray | None) -> None:
        """Write a shard. pixels: uint8 [n, H, W, C] of its ids. labels: int64 [n]. Raises OSError if the disk does;
        what was written then is no whole shard."""
        ids, hashes = self.ids(shard), []
        for name, data in zip(self.names(shard), _encoded(self.kind, ids, pixels, labels), strict=True):
            files.replace(self.path / name, data)
            hashes.append(hashlib.sha256(data).hexdigest())
        text = json.dumps(self._contents(shard, hashes)) + "\n"
        files.replace(self._sidecar(shard), text.encode())

    def _sidecar(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.json"

    def _contents(self, shard: int, hashes: list[str]) -> dict[str, Any]:
        ids = self.ids(shard)
        named = dict(zip(self.names(shard), hashes, strict=True))
        return {"job": self.job, "first": ids.start, "samples": len(ids), "sha256": named}


def _encoded(kind: str, ids: range, pixels: np.ndarray, labels: np.ndarray | None) -> list[bytes]:
    """The files of a shard: the same bytes for the same pictures, at any time and for any user."""
    if kind == "png":
        return [pictures.png(picture) for picture in pixels]
    buffer = io.BytesIO()
    if kind == "npz":  # numpy dates what is in it 1980
        more: dict[str, Any] = {} if labels is None else {"labels": labels}
        np.savez(buffer, arr_0=pixels, ids=np.arange(ids.start, ids.stop), **more)
        return [buffer.getvalue()]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for k, i in enumerate(ids):
            _add(tar, f"{i:08d}.png", pictures.png(pixels[k]))
            if labels is not None:
                _add(tar, f"{i:08d}.cls", str(labels[k]).encode())
    return [buffer.getvalue()]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of nobody, in 1970
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()

"""What a dataset is of: a model, a sampler's table and the sample ids, each drawn the same whoever draws it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import diffkern
from diffkern import options, pictures
from diffkern.identity import digest, hash_tensors
from diffkern.samplers.loop import sample
from diffkern.samplers.step import Model, placement
from diffkern.samplers.table import Table


@dataclass(frozen=True)
class Plan:
    """As the arguments of `sample_dataset`."""

    model: Model
    table: Table
    n: int
    shape: tuple[int, ...] | None
    seed: int
    labels: int | Sequence[int] | None
    guidance: float | None
    null_label: int | None
    decode: Callable[[Tensor], Tensor] | None
    batch_size: int
    batch_invariant: bool

    def check(self) -> None:
        """Raise ValueError for arguments that do not fit together."""
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if self.cycle == []:
            raise ValueError("labels must be one label or several, not none")
        self.draw(range(0))

    @cached_property
    def cycle(self) -> list[int] | None:
        """The labels that the samples have in turn."""
        if self.labels is None:
            return None
        return [self.labels] if isinstance(self.labels, int) else [int(label) for label in self.labels]

    def labels_of(self, ids: range) -> list[int] | None:
        return None if self.cycle is None else [self.cycle[i % len(self.cycle)] for i in ids]

    def draw(
        self, ids: range, each_step: Callable[[], None] | None = None, progress: bool | None = False
    ) -> Tensor:  # fmt: skip
        """float32 [n, C, H, W] of these ids, on the model's device. each_step: called after every step. Raises
        ValueError if the model makes numbers that are not finite."""
        with diffkern.batch_invariant() if self.batch_invariant else contextlib.nullcontext():
            found = sample(
                self.model,
                self.table,
                shape=self.shape,
                seed=self.seed,
                sample_ids=ids,
                labels=self.labels_of(ids),
                guidance=self.guidance,
                null_label=self.null_label,
                batch_size=self.batch_size,
                progress=progress,
                callback=None if each_step is None else lambda _: each_step(),
            )
            if self.decode is not None and len(ids):
                with torch.no_grad():
                    found = self.decode(found)
        if not torch.isfinite(found).all():
            hint = "" if self.dtype == "float32" else ": try --dtype float32"
            raise ValueError(f"the model made NaN or infinite values in {self.dtype}{hint}")
        return found

    def batches(self, ids: range) -> Iterator[range]:
        """The parts of a range that are drawn at a time."""
        return (ids[i : i + self.batch_size] for i in range(0, len(ids), self.batch_size))

    def shard(self, ids: range, each_step: Callable[[int], bool]) -> np.ndarray | None:
        """uint8 [n, H, W, C] of these ids. each_step: told how many of them are done; None is returned once it gives
        False."""
        parts: list[np.ndarray] = []
        wanted = True

        def step() -> None:
            nonlocal wanted
            wanted = wanted and each_step(sum(map(len, parts)))

        for part in self.batches(ids):
            found = self.draw(part, step)
            if found.dim() != 4:
                raise ValueError(f"a picture is [C, H, W], not of shape {tuple(found.shape[1:])}: give decode")
            parts.append(pictures.to_uint8(found))
            if not wanted:
                return None
        return np.concatenate(parts)

    @property
    def device(self) -> torch.device:
        return placement(self.model)[0]

    @property
    def dtype(self) -> str:
        return str(placement(self.model)[1]).removeprefix("torch.")

    def settings(self) -> dict[str, Any]:
        """All that the pictures depend on, to the bit where the processors are of one kind."""
        start = f"{self.table.init_scale}".encode()
        shape = self.shape if self.shape is not None else self.model.sample_shape  # type: ignore[attr-defined]
        null = self.null_label if self.null_label is not None else getattr(self.model, "null_label", None)
        device, dtype = placement(self.model)
        return {
            "model": digest(self.model),
            "decode": None if self.decode is None else digest(self.decode),
            "sampler": self.table.name,
            "steps": len(self.table),
            "table": hash_tensors([("rows", self.table.data)], hashlib.sha256(start)).hexdigest(),
            "shape": list(shape),
            "seed": self.seed,
            "labels": self.cycle,
            "guidance": None if self.guidance is None else float(self.guidance),
            "null label": null,
            "dtype": self.dtype,
            "device": device.type,
            "backend": options.backends(("randn", *getattr(self.model, "OPS", ()), "sampler_step"), device, dtype),
            "batch invariant": self.batch_invariant,
            "batch size": None if self.batch_invariant else self.batch_size,
            "n": self.n,
            "diffkern": diffkern.__version__,
            "torch": torch.__version__,
        }

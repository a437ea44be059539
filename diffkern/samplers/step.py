"""One step of a batch: the model's call, `sampler_step`, and what the next step reads. The loop runs it; a CUDA graph
holds it. It asks the device for nothing: the table, the counters and what the model is told lie there before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from diffkern.ops.sampler_step import C_IN, sampler_step
from diffkern.samplers.table import Table

Model = Callable[..., Tensor]
"""(x [B, ...], timestep float32 [B]) or (x, timestep, labels int64 [B]) -> the model output [B, ...].

A model may have a method `conditioning(timestep [N])` or `conditioning(timestep, labels)` -> [..., N, width]: all that
it computes from these alone, or without labels [..., N R, width], with R rows for a timestep, each for B / R samples in
turn. That is then called for many steps at once, and the model with one step's part of the result, as
model(x, conditioning=[..., B, width]).

What is bound to a network for a run, as a prompt is, a model gives out by `unbound(B)` -> (network, given): it calls
network(x, ..., **given), and a graph of the network serves all that is bound to it later."""

# Rows of conditioning that are made at once: enough to read the weights behind them seldom, and 100 MB for DiT-XL/2.
_ROWS = 128


def unbound(model: Model, batch: int) -> tuple[Model, dict[str, Any]]:
    """The network that the model is without what was bound to it, and that by name. batch: samples in a call."""
    return model.unbound(batch) if hasattr(model, "unbound") else (model, {})


def placement(model: Any) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that a model takes its input in: those of its parameters, else CPU and float32."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    return first.device, first.dtype


class Told:
    """What a model is told in each step beside x: its conditioning, or else the timestep and the labels."""

    def __init__(self, model: Model, timesteps: Tensor, labels: Tensor | None, batch: int) -> None:
        """timesteps: float32 [R], of all steps. labels: int64 [batch] or None. batch: samples in a call."""
        self.condition = getattr(model, "conditioning", None)
        self.timesteps, self.labels, self.batch = timesteps, labels, batch
        self.distinct: Tensor | None = None
        self.every = len(timesteps)  # steps that a chunk is for
        self.which = torch.zeros(batch, dtype=torch.int64, device=timesteps.device)
        if self.condition is not None:
            if labels is not None:
                self.distinct, self.which = labels.unique(return_inverse=True)
            self.every = max(1, _ROWS // (1 if self.distinct is None else len(self.distinct)))

    def chunk(self, first: int) -> tuple[Tensor, Tensor, int]:
        """For the steps from `first` on, `every` of them or what is left: rows [..., N, width], which of them each
        sample is told in the first of these steps, int64 [batch], and how many rows further in the next."""
        times = self.timesteps[first : first + self.every]
        if self.condition is None:
            return times[:, None], self.which, 1
        if self.distinct is not None:
            n = len(self.distinct)
            return self.condition(times.repeat_interleave(n), self.distinct.repeat(len(times))), self.which, n
        # There is one row for all, or one for each half of a guided batch, or for each sample.
        rows = self.condition(times)
        n = rows.shape[-2] // len(times)
        each = torch.arange(n, device=times.device).repeat_interleave(self.batch // n)
        return rows, each, n

    def capacity(self, rows: Tensor, n: int) -> int:
        """The most rows that a chunk of such a run has, however many of its labels are the same. rows, n: of the first
        chunk."""
        if self.condition is None or self.distinct is None:
            return rows.shape[-2]
        return min(len(self.timesteps) * self.batch, max(_ROWS, self.batch))


@dataclass(eq=False)
class Step:
    """A batch between two steps. Calling it does the next one: in new tensors, or `fixed`, in these."""

    rows: Tensor  # float32 [R + 1, 32]: the table
    keys: Tensor | None
    scale: Tensor | None  # of guidance
    labels: Tensor | None  # of a model that is told the timestep
    start: Tensor  # what the model sees in the first step
    x: Tensor
    model_input: Tensor  # what it sees in the next
    row: Tensor  # int64 [B]: of the table
    base: Tensor | None
    past: list[Tensor]
    told: Tensor  # the rows of a chunk
    place: Tensor  # int64 [B, or 2 B with guidance]: which of them
    stride: Tensor  # int64 []: how much further in the next step
    given: dict[str, Any]  # what the network is given beside these
    conditioned: bool
    capacity: int
    fixed: bool = False

    @classmethod
    def begin(
        cls, table: Table, rows: Tensor, x: Tensor, dtype: torch.dtype, keys: Tensor, scale: Tensor | None, told: Told,
        given: dict[str, Any],
    ) -> Step:  # fmt: skip
        """Before the first step. rows: of the table, on the device. x: float32 [B, ...], the initial noise, scaled.
        dtype: the model's. given: of `unbound`."""
        start = (rows[0, C_IN] * x).to(dtype).repeat(1 if scale is None else 2, *(1,) * (x.dim() - 1))
        chunk, place, stride = told.chunk(0)
        return cls(
            rows=rows,
            keys=keys if table.noisy else None,
            scale=scale,
            labels=told.labels if told.condition is None else None,
            start=start,
            x=x,
            model_input=start,
            row=torch.zeros(len(x), dtype=torch.int64, device=x.device),
            base=torch.zeros_like(x) if table.uses_base else None,
            past=[torch.zeros_like(x) for _ in range(table.history)],
            told=chunk,
            place=place.clone(),
            stride=torch.full((), stride, device=x.device),
            given=given,
            conditioned=told.condition is not None,
            capacity=told.capacity(chunk, stride),
        )

    def tell(self, chunk: tuple[Tensor, Tensor, int]) -> None:
        """What the model is told from here on: of `Told.chunk`. The stride is that of the chunk before."""
        rows, place, _ = chunk
        if self.fixed:
            self._write_told(rows)
        else:
            self.told = rows
        self.place.copy_(place)

    def __call__(self, network: Model, first: bool = False) -> None:
        told = self.told.index_select(-2, self.place)
        seen = self.start if first else self.model_input
        if self.conditioned:
            output = network(seen, conditioning=told, **self.given)
        else:
            labels = () if self.labels is None else (self.labels,)
            output = network(seen, told.squeeze(-1), *labels, **self.given)
        # The state takes the layout of the model's output once: no kernel then has to transpose it.
        if first and output.dim() == 4 and not output.is_contiguous():
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        x, model_input, base, entry = sampler_step(
            self.x, output, self.rows, self.row, self.keys, self.scale, self.base,
            *(self.past + [None] * (3 - len(self.past))),
        )  # fmt: skip
        if self.fixed:
            for i in range(len(self.past) - 1, 0, -1):
                self.past[i].copy_(self.past[i - 1])
            kept = [self.x, self.model_input, self.base, *self.past[:1]]
            for buffer, made in zip(kept, (x, model_input, base, entry), strict=False):
                if buffer is not None:
                    buffer.copy_(made)
        else:
            self.x, self.model_input = x, model_input
            self.base = None if self.base is None else base
            self.past = [entry, *self.past][: len(self.past)]
        self.row += 1
        self.place += self.stride

    def state(self) -> list[Tensor]:
        """What a step writes, if it is `fixed`."""
        return [t for t in (self.x, self.model_input, self.base, *self.past, self.row, self.place) if t is not None]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of it by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        named.update({f"h{i}": entry for i, entry in enumerate(self.past)})
        named.update({f"given {i}": leaf for i, leaf in enumerate(tree_leaves(self.given))})
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    def kind(self) -> tuple[object, ...]:
        """Equal for two batches, before their first step, that do the same in each step with other numbers."""
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors().items()}
        shapes["told"] = (self.told.dtype, (*self.told.shape[:-2], self.capacity, self.told.shape[-1]))
        return (self.conditioned, *shapes.items())

    @torch.inference_mode(False)  # its tensors are written later, in whatever mode
    def settled(self) -> Step:
        """A copy, after a step at least, whose steps write into the tensors that it has."""
        x, told = self.x.clone(), self.told
        past = [torch.empty_like(x).copy_(entry) for entry in self.past]
        model_input = self.model_input.clone()
        # The layout may have changed in the first step; where it did not, all steps read the same tensor.
        alike = self.start.dtype == model_input.dtype and self.start.stride() == model_input.stride()
        step = replace(
            self,
            x=x,
            model_input=model_input,
            start=model_input if alike else self.start.clone(),
            base=None if self.base is None else torch.empty_like(x).copy_(self.base),
            past=past,
            told=told.new_empty(*told.shape[:-2], self.capacity, told.shape[-1]),
            given=tree_map(_clone, self.given),
            **{name: _clone(getattr(self, name)) for name in _CLONED},
            fixed=True,
        )
        step._write_told(told)
        return step

    def load(self, begun: Step) -> None:
        """Take over a step of the same kind, before its first step, into the tensors that there are."""
        own = self.tensors()
        for name, t in begun.tensors().items():
            if name not in ("told", "model_input"):
                own[name].copy_(t)
        self._write_told(begun.told)

    def _write_told(self, rows: Tensor) -> None:
        self.told.narrow(-2, 0, rows.shape[-2]).copy_(rows)


_CLONED = ("rows", "keys", "scale", "labels", "row", "place", "stride")


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

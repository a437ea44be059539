"""The one sampling loop: whatever the sampler, a model call and a `sampler_step` per row of its table.

Nothing in the loop waits for the device: coefficients, timesteps and noise keys are on it before the loop starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffkern.ops.randn import Draw, noise_keys, randn
from diffkern.ops.sampler_step import C_IN, sampler_step
from diffkern.samplers.table import Table

Model = Callable[..., Tensor]
"""(x [B, ...], timestep float32 [B]) or (x, timestep, labels int64 [B]) -> the model output [B, ...].

A model may have a method `conditioning(timestep [N])` or `conditioning(timestep, labels)` -> [..., N, width]: all that
it computes from these alone, or without labels [..., N R, width], with R rows for a timestep, each for B / R samples in
turn. That is then called for many steps at once, and the model with one step's part of the result, as
model(x, conditioning=[..., B, width])."""

# Rows of conditioning that are made at once: enough to read the weights behind them seldom, and 100 MB for DiT-XL/2.
_ROWS = 128


class Progress(NamedTuple):
    """What a callback is told after each step: the step's index, its timestep, the samples so far and their ids."""

    step: int
    timestep: float
    x: Tensor
    sample_ids: Tensor


@torch.no_grad()
def sample(
    model: Model,
    table: Table,
    n: int | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    sample_ids: Iterable[int] | None = None,
    labels: int | Iterable[int] | Tensor | None = None,
    guidance: float | Tensor | None = None,
    null_label: int | None = None,
    batch_size: int = 64,
    progress: bool | None = None,
    callback: Callable[[Progress], None] | None = None,
    trajectory: bool = False,
) -> Any:
    """Draw n samples from a model with a sampler's table.

    model: see `Model`; called in its own dtype, on its own device. shape: of one sample; default model.sample_shape.
    seed, sample_ids: sample i of a seed is the same picture alone, in any batch and with any batch_size; ids default to
    0..n-1. labels: one or n class labels; for a class-conditional model the default is the null label. guidance:
    classifier-free guidance scale (Ho & Salimans 2022), one or float [n]; needs labels and a null label, or else a
    model without labels that puts out both halves, unconditional first, for the doubled batch it is given. progress:
    True, False, or None to show a bar on a terminal once the work takes longer than two seconds. callback: called
    after every step.

    Returns float32 [n, *shape], and with trajectory a pair of that and float32 [steps + 1, n, *shape], the noise first.
    Raises ValueError for arguments that do not fit together."""
    ids, n = _ids(n, sample_ids)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    device, dtype = _placement(model)
    shape = tuple(shape if shape is not None else getattr(model, "sample_shape", ()))
    if not shape:
        raise ValueError("give the shape of one sample: the model has no sample_shape")
    null_label = getattr(model, "null_label", None) if null_label is None else null_label
    classes, scale = _conditioning(n, labels, guidance, null_label, device)

    run = _Run(model, table, shape, seed, device, dtype, callback)
    out = torch.empty(n, *shape, device=device)
    path = torch.empty(len(table) + 1, n, *shape, device=device) if trajectory else None
    # disable=None hides the bar where there is no terminal
    hidden = None if progress is None else not progress
    delay = 2.0 if progress is None else 0.0
    batches = range(0, n, batch_size)
    with tqdm(total=len(table) * len(batches), desc=table.name, unit="step", disable=hidden, delay=delay) as bar:
        for start in batches:
            part = slice(start, min(start + batch_size, n))
            out[part] = run.batch(
                ids[part],
                None if classes is None else classes[part],
                None if scale is None else scale[part],
                null_label,
                None if path is None else path[:, part],
                bar,
            )
    return out if path is None else (out, path)


class _Run:
    """What all batches of one call share: the table and its timesteps, on the device."""

    def __init__(
        self,
        model: Model,
        table: Table,
        shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        callback: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.table, self.shape, self.seed = model, table, shape, seed
        self.device, self.dtype, self.callback = device, dtype, callback
        self.rows = table.data.to(device, torch.float32)
        self.timesteps = torch.tensor(table.timesteps, dtype=torch.float32, device=device)

    def batch(
        self, ids: Tensor, classes: Tensor | None, scale: Tensor | None, null_label: int | None, path: Any, bar: Any
    ) -> Tensor:
        table, b = self.table, len(ids)
        keys = noise_keys(self.seed, ids, self.device)
        x = table.init_scale * randn(keys, list(self.shape), int(Draw.SAMPLING))
        if path is not None:
            path[0] = x
        doubled = 1 if scale is None else 2
        if scale is not None and classes is not None:
            assert null_label is not None
            classes = torch.cat([torch.full_like(classes, null_label), classes])
        model_input = (self.rows[0, C_IN] * x).to(self.dtype)
        model_input = model_input.repeat(doubled, *(1,) * len(self.shape))
        index = torch.arange(len(table), device=self.device)[:, None].repeat(1, b)
        base = torch.zeros_like(x) if table.uses_base else None
        past = [torch.zeros_like(x) for _ in range(table.history)]
        for i, (given, named) in enumerate(self.given(classes, doubled * b)):
            output = self.model(model_input, *given, **named)
            # The state takes the layout of the model's output once: no kernel then has to transpose it.
            if i == 0 and output.dim() == 4 and not output.is_contiguous():
                x = x.contiguous(memory_format=torch.channels_last)
            x, model_input, next_base, entry = sampler_step(
                x, output, self.rows, index[i], keys if table.noisy else None, scale, base,
                *(past + [None] * (3 - len(past))),
            )  # fmt: skip
            base = next_base if base is not None else None
            past = [entry, *past][: table.history]
            if path is not None:
                path[i + 1] = x
            if self.callback is not None:
                self.callback(Progress(i, table.timesteps[i], x, ids))
            bar.update()
        return x

    def given(self, classes: Tensor | None, batch: int) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
        """What the model is given beside x in each step."""
        condition = getattr(self.model, "conditioning", None)
        if condition is None:
            labels = () if classes is None else (classes,)
            yield from (((times, *labels), {}) for times in self.timesteps[:, None].repeat(1, batch))
            return
        distinct, which = (None, None) if classes is None else classes.unique(return_inverse=True)
        n = 1 if distinct is None else len(distinct)
        for times in self.timesteps.split(max(1, _ROWS // n)):
            labels = () if distinct is None else (distinct.repeat(len(times)),)
            rows = condition(times.repeat_interleave(n), *labels).unflatten(-2, (len(times), -1))
            for row in rows.unbind(-3):
                told = row if which is None else row.index_select(-2, which)
                # without labels there is one row for all, or one for each half, or for each sample
                yield (), {"conditioning": told.repeat_interleave(batch // told.shape[-2], -2)}


def _ids(n: int | None, sample_ids: Iterable[int] | None) -> tuple[Tensor, int]:
    if sample_ids is None:
        n = 1 if n is None else n
        if n < 0:
            raise ValueError(f"n must be at least 0, not {n}")
        return torch.arange(n), n
    ids = torch.as_tensor(list(sample_ids), dtype=torch.int64)
    if n is not None and n != len(ids):
        raise ValueError(f"n is {n} but there are {len(ids)} sample_ids")
    return ids, len(ids)


def _placement(model: Any) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that a model takes its input in: those of its parameters, else CPU and float32."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    return first.device, first.dtype


def _conditioning(
    n: int, labels: Any, guidance: Any, null_label: int | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Labels int64 [n] and guidance float32 [n], each or None."""
    if labels is None and null_label is not None:
        if guidance is not None:
            raise ValueError("guidance needs labels to guide towards")
        labels = null_label
    classes = None
    if labels is not None:
        classes = torch.as_tensor(labels if isinstance(labels, (int, Tensor)) else list(labels), dtype=torch.int64)
        if classes.dim() > 1 or (classes.dim() == 1 and len(classes) != n):
            raise ValueError(f"labels must be one or {n} numbers, not of shape {tuple(classes.shape)}")
        classes = classes.expand(n).to(device)
        if isinstance(guidance, (int, float)) and guidance == 1:
            guidance = None  # m_u + 1 (m_c - m_u) is the conditional model itself: half the work
        if guidance is not None and null_label is None:
            raise ValueError("guidance needs the model's null label: give null_label")
    if guidance is None:
        return classes, None
    scale = torch.as_tensor(guidance, dtype=torch.float32)
    if scale.dim() > 1 or (scale.dim() == 1 and len(scale) != n) or not torch.isfinite(scale).all():
        raise ValueError(f"guidance must be one or {n} finite numbers")
    return classes, scale.expand(n).to(device)

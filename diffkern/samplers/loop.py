"""The one sampling loop: whatever the sampler, a `Step` per row of its table.

Nothing in the loop waits for the device: coefficients, timesteps and noise keys are on it before the loop starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.ops.randn import Draw, noise_keys, randn
from diffkern.progress import progress_bar
from diffkern.samplers import graph
from diffkern.samplers.step import Model, Step, Told, placement, unbound
from diffkern.samplers.table import Table


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
    cuda_graph: bool | str = "auto",
) -> Any:
    """Draw n samples from a model with a sampler's table.

    model: see step.Model; called in its own dtype, on its own device. shape: of one sample; default model.sample_shape.
    seed, sample_ids: sample i of a seed is the same picture alone, in any batch and with any batch_size; ids default to
    0..n-1. labels: one or n class labels; for a class-conditional model the default is the null label. guidance:
    classifier-free guidance scale (Ho & Salimans 2022), one or float [n]; needs labels and a null label, or else a
    model without labels that puts out both halves, unconditional first, for the doubled batch it is given. progress:
    True, False, or None to show a bar on a terminal once the work takes longer than two seconds. callback: called
    after every step.

    cuda_graph: True records a step, on a GPU in a CUDA graph, on a CPU as the calls of its kernels, and replays it,
    with the same result bit for bit. Weights may change in place or be replaced; a Python number that the model reads
    stays what it was in the recording. What cannot be recorded runs without, after one warning. "auto" does so for
    diffkern's own networks in runs of 8 steps or more. False does not, and frees the model's graphs, which on a GPU
    keep the memory that a step needs.

    Returns float32 [n, *shape], and with trajectory a pair of that and float32 [steps + 1, n, *shape], the noise first.
    Raises ValueError for arguments that do not fit together."""
    ids, n = _ids(n, sample_ids)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    device, dtype = placement(model)
    graph.check(cuda_graph, device)
    shape = tuple(shape if shape is not None else getattr(model, "sample_shape", ()))
    if not shape:
        raise ValueError("give the shape of one sample: the model has no sample_shape")
    null_label = getattr(model, "null_label", None) if null_label is None else null_label
    classes, scale = _conditioning(n, labels, guidance, null_label, device)

    batches = _Batches(model, table, shape, seed, device, dtype, callback, cuda_graph)
    out = torch.empty(n, *shape, device=device)
    path = torch.empty(len(table) + 1, n, *shape, device=device) if trajectory else None
    starts = range(0, n, batch_size)
    with progress_bar(progress, total=len(table) * len(starts), desc=table.name, unit="step") as bar:
        for start in starts:
            part = slice(start, min(start + batch_size, n))
            batches.run(
                ids[part],
                None if classes is None else classes[part],
                None if scale is None else scale[part],
                null_label,
                out[part],
                None if path is None else path[:, part],
                bar,
            )
    return out if path is None else (out, path)


class _Batches:
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
        cuda_graph: bool | str,
    ) -> None:
        self.model, self.table, self.shape, self.seed = model, table, shape, seed
        self.device, self.dtype, self.callback, self.cuda_graph = device, dtype, callback, cuda_graph
        self.rows = table.data.to(device, torch.float32)
        self.timesteps = torch.tensor(table.timesteps, dtype=torch.float32, device=device)

    def run(
        self, ids: Tensor, classes: Tensor | None, scale: Tensor | None, null_label: int | None, out: Tensor,
        path: Tensor | None, bar: Any,
    ) -> None:  # fmt: skip
        """Write the samples into out [B, ...], and the way to them into path [steps + 1, B, ...]."""
        keys = noise_keys(self.seed, ids, self.device)
        x = self.table.init_scale * randn(keys, list(self.shape), int(Draw.SAMPLING))
        if path is not None:
            path[0] = x
        if scale is not None and classes is not None:
            assert null_label is not None
            classes = torch.cat([torch.full_like(classes, null_label), classes])
        calls = len(ids) * (1 if scale is None else 2)
        told = Told(self.model, self.timesteps, classes, calls)
        network, given = unbound(self.model, calls)
        step = Step.begin(self.table, self.rows, x, self.dtype, keys, scale, told, given)
        with graph.start(network, step, len(self.table), self.cuda_graph) as do_step:
            for i, timestep in enumerate(self.table.timesteps):
                if i and i % told.every == 0:
                    do_step.step.tell(told.chunk(i))
                do_step()
                if path is not None:
                    path[i + 1] = do_step.step.x
                if self.callback is not None:
                    self.callback(Progress(i, timestep, do_step.step.x.clone(), ids))
                bar.update()
            out.copy_(do_step.step.x)


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

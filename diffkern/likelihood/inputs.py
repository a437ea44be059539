"""What every way to score an image asks of its arguments, checked in one place: one sentence says what was wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diffkern.likelihood.denoiser import Denoiser


def samples_of(x: Any, what: str = "x") -> Tensor:
    """x as it came. Raises ValueError unless it is a floating-point tensor [n, ...] of finite numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or 0 in x.shape[1:]:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{what} must be a floating-point tensor [n, ...] of n samples, not {got}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} has numbers that are not finite")
    return x


def labels_of(denoiser: Denoiser, labels: Any, n: int) -> Tensor | None:
    """int64 [n] on the model's device; None for a model without classes. labels: one or n of them, None for the null
    label of a class-conditional model. Raises ValueError for another number of labels, or one that is no class."""
    if labels is None:
        labels = getattr(denoiser.model, "null_label", None)
        if labels is None:
            return None
    classes = torch.as_tensor(labels)
    if classes.is_floating_point() or classes.dim() > 1 or (classes.dim() == 1 and len(classes) != n):
        raise ValueError(f"labels must be one or {n} whole numbers, not {classes.dtype} {list(classes.shape)}")
    count = getattr(denoiser.model, "num_classes", None)
    if count is not None and classes.numel() and not 0 <= classes.min() <= classes.max() < count:
        raise ValueError(f"labels must be classes of the model, 0 to {count - 1}")
    return classes.to(denoiser.device, torch.int64).expand(n)


def timesteps_of(denoiser: Denoiser, t: Any, n: int) -> Tensor:
    """int64 [n] on the model's device. t: one or n timesteps of the schedule. Raises ValueError for others, and for one
    at which the model cannot say what x_0 is."""
    timestep = torch.as_tensor(t)
    if timestep.is_floating_point() or timestep.shape not in ((), (n,)):
        raise ValueError(f"t must be one or {n} whole timesteps, not {timestep.dtype} {list(timestep.shape)}")
    schedule = denoiser.schedule
    if timestep.numel() and not 0 <= timestep.min() <= timestep.max() < len(schedule):
        raise ValueError(f"t must be timesteps of the schedule, 0 to {len(schedule) - 1}")
    if schedule.prediction == "epsilon" and (schedule.alpha_t[timestep.cpu()] == 0).any():
        raise ValueError("a model that predicts epsilon knows no x0 where alpha_t = 0: it must predict v or x0")
    return timestep.to(denoiser.device, torch.int64).expand(n)


def ids_of(sample_ids: Iterable[int] | None, n: int) -> Tensor:
    """int64 [n] on the CPU: the ids of the samples for their noise, 0..n-1 if none are given."""
    if sample_ids is None:
        return torch.arange(n)
    ids = torch.as_tensor(sample_ids if isinstance(sample_ids, Tensor) else list(sample_ids), dtype=torch.int64).cpu()
    if ids.shape != (n,):
        raise ValueError(f"there are {n} samples but {ids.numel()} sample_ids")
    return ids


def positive(**numbers: float) -> None:
    """Raise ValueError, naming it, for a number that is not > 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, not {value}")

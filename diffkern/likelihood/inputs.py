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

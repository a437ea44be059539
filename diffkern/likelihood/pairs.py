"""Many (x_t, t) pairs of many samples, in full batches: what the variational bounds are sums of.

Whatever the levels, a bound is a prior term, which needs no model, and one term of each pair, which the op `vlb_term`
makes from a row of a table. Pairs are taken column by column, all samples of a column in turn, so that batches are full
with one sample or with thousands, and the noise of column j is draw `Draw.BOUND` + j of each sample, whatever else is
in its batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffkern.layout import memory_format
from diffkern.likelihood.denoiser import Denoiser, Levels
from diffkern.likelihood.inputs import ids_of, labels_of, positive, samples_of
from diffkern.ops.add_noise import add_noise
from diffkern.ops.randn import Draw, noise_keys, normal
from diffkern.ops.vlb_term import vlb_term
from diffkern.progress import progress_bar
from diffkern.samplers.grid import Point, initial_scale

# The columns of a call, and after them the draws of its random times.
COLUMNS = 1 << 23


@dataclass(eq=False)
class Pairs:
    """x: [n, ...] on the model's device, in what the bound computes in: float64 where both x and the model are, else
    float32. labels: int64 [n] or None. keys: int64 [n, 2]. batch_size: pairs in a model call."""

    denoiser: Denoiser
    x: Tensor
    labels: Tensor | None
    keys: Tensor
    batch_size: int
    progress: bool | None

    @classmethod
    def of(
        cls, denoiser: Denoiser, x: Any, labels: Any, seed: int, sample_ids: Iterable[int] | None, batch_size: int,
        progress: bool | None, levels: bool,
    ) -> Pairs:  # fmt: skip
        """Checks the arguments of a bound. levels: whether x must be pixels of 8 bits. Raises ValueError."""
        x = samples_of(x)
        shape = getattr(denoiser.model, "sample_shape", None)
        if shape is not None and tuple(x.shape[1:]) != tuple(shape):
            raise ValueError(f"the model takes samples of shape {list(shape)}, not {list(x.shape[1:])}")
        if levels:
            _check_levels(x)
        positive(batch_size=batch_size)
        keys = noise_keys(seed, ids_of(sample_ids, len(x)), denoiser.device)
        whole = x.dtype == torch.float64 and denoiser.dtype in (None, torch.float64)
        x = x.to(denoiser.device, torch.float64 if whole else torch.float32)
        return cls(denoiser, x, labels_of(denoiser, labels, len(x)), keys, batch_size, progress)

    @property
    def dims(self) -> int:
        """Numbers in a sample."""
        return self.x.shape[1:].numel()

    def uniforms(self, count: int, draw: int) -> Tensor:
        """float64 [n, count] between 0 and 1, the same on every device. draw: which of each sample."""
        return torch.special.ndtr(normal(self.keys.cpu(), (count,), int(Draw.BOUND) + COLUMNS + draw, torch.float64))

    def prior(self) -> Tensor:
        """KL(q(x_{T-1} | x_0) || N(0, v)) of each sample, float64 [n]. v is that of the noise which samplers start
        from: 1, or sigma_{T-1}^2 where alpha = 1."""
        schedule = self.denoiser.schedule
        last = Point(0.0, schedule.alpha_t[-1].item(), schedule.sigma_t[-1].item())
        v = torch.tensor(initial_scale(schedule, last) ** 2, dtype=torch.float64)
        ratio = schedule.sigma_t[-1] ** 2 / v
        squares = self.x.to(torch.float64).flatten(1).square().sum(1).cpu()
        return 0.5 * (self.dims * (ratio - 1 - ratio.log()) + last.alpha**2 / v * squares)

    def terms(self, levels: Levels, table: Tensor, row: Tensor, learned: bool, name: str) -> Tensor:
        """The term of each pair in nats, float64 [n, J] on the CPU.

        levels: of R noise levels. table: float64 [R, 16], see `vlb_term`. row: int64 [n, J], the level of each pair.
        learned: whether the model must put out a variance. name: on the progress bar."""
        n, J = row.shape
        if J > COLUMNS:
            raise ValueError(f"a sample can have {COLUMNS} pairs, not {J}: take fewer draws")
        device, x, labels = self.x.device, self.x, self.labels
        table, row = table.to(device, x.dtype), row.T.reshape(-1).to(device)
        levels = Levels(*(v.to(device) for v in levels))
        alpha_sigma = torch.stack([levels.alpha, levels.sigma], 1).to(x.dtype)
        found = torch.empty(n * J, dtype=x.dtype, device=device)
        with progress_bar(self.progress, total=n * J, desc=name, unit="pair") as bar:
            for start in range(0, n * J, self.batch_size):
                stop = min(start + self.batch_size, n * J)
                which, rows = torch.arange(start, stop, device=device) % n, row[start:stop]
                x0 = x[which]
                x_t = self._noised(x0, rows, alpha_sigma, start, stop)
                told = Levels(*(v[rows] for v in levels))
                m = self.denoiser.output(x_t, told, None if labels is None else labels[which])
                _check_output(m, x0, learned)
                found[start:stop] = vlb_term(x0, x_t, m, table, rows)
                # The samples take the layout of the model's output once: no kernel then has to transpose them.
                if start == 0 and m.dim() == 4:
                    x = x.contiguous(memory_format=memory_format(m))
                bar.update(stop - start)
        return found.to("cpu", torch.float64).reshape(J, n).T.contiguous()

    def _noised(self, x0: Tensor, rows: Tensor, alpha_sigma: Tensor, start: int, stop: int) -> Tensor:
        """x_t of the pairs from start to stop: the op draws one noise of each sample, so a column at a time."""
        n = len(self.x)
        bounds = [start, *range((start // n + 1) * n, stop, n), stop]
        parts = [
            add_noise(
                x0[a - start : b - start], rows[a - start : b - start], alpha_sigma,
                self.keys[a % n : a % n + b - a], int(Draw.BOUND) + a // n,
            )[0]
            for a, b in pairwise(bounds)
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def neighbour_variance(y: Tensor) -> Tensor:
    """The variance of each number of a noisy smooth curve, from the differences with its neighbours: the square of
    y_{j-1} - 2 y_j + y_{j+1} is 6 variances on average where the curve is straight, and more where it bends; at both
    ends that of y_j - y_{j+1} is 2, and more where the curve is steep.
    y: float64 [n, K]. Returns [n, K], NaN for K < 3."""
    if y.shape[1] < 3:
        return torch.full_like(y, torch.nan)
    ends = (y[:, :-1] - y[:, 1:]).square() / 2
    inner = (y[:, 2:] - 2 * y[:, 1:-1] + y[:, :-2]).square() / 6
    return torch.cat([ends[:, :1], inner, ends[:, -1:]], 1)


def _check_levels(x: Tensor) -> None:
    level = (x.to(torch.float64) + 1) * 127.5
    if len(x) and not (level.min() >= -1e-3 and level.max() <= 255 + 1e-3):
        raise ValueError(
            f"pixels of 8 bits must be on [-1, 1], but x runs from {x.min().item():.4g} to {x.max().item():.4g}"
        )
    off = (level - level.round()).abs()
    if len(x) and off.max() > 1e-3:
        raise ValueError(
            f"pixels of 8 bits must be on the levels k / 127.5 - 1, but {x.flatten()[off.argmax()].item():.6g} lies "
            'between two (decoder="gaussian" is for continuous data)'
        )


def _check_output(m: Tensor, x: Tensor, learned: bool) -> None:
    doubled = (len(x), 2 * x.shape[1], *x.shape[2:])
    if learned and m.shape != doubled:
        raise ValueError(
            f'variance="learned_range" needs a model that puts out {list(doubled[1:])} numbers, a variance beside each '
            f"of the sample's, not {list(m.shape[1:])}"
        )
    if m.shape not in (x.shape, doubled):
        raise ValueError(f"the model made {list(m.shape[1:])} numbers of samples of {list(x.shape[1:])}")

"""A model and its schedule as what they know of p(x): x_0, epsilon and the score at any noise level, also between the
schedule's.

Any path from data to noise is, up to a scale, an arc: with alpha_t = r cos(angle) and sigma_t = r sin(angle),
x_t / r turns from the data (angle 0) to the noise (pi / 2), and its velocity d(x_t / r) / d(angle) is
cos(angle) epsilon - sin(angle) x_0, the v of Salimans & Ho 2022 whatever the model predicts. So everything continuous
in time is written in the angle: it is finite at both ends, and one formula serves variance preserving, variance
exploding and flow models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.layout import per_sample
from diffkern.models.bundle import Diffusion
from diffkern.samplers.grid import SMALLEST_ALPHA
from diffkern.samplers.step import Model, placement
from diffkern.schedules import PREDICTIONS, Schedule


class Levels(NamedTuple):
    """The noise level of each sample: x_t = alpha x_0 + sigma epsilon, and the time that the model is told there.
    float64 [B] each."""

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    @property
    def radius(self) -> Tensor:
        """r = sqrt(alpha^2 + sigma^2): 1 for a variance-preserving schedule."""
        return torch.hypot(self.alpha, self.sigma)

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2) (Kingma et al. 2021, eq. 2)."""
        return 2 * (self.alpha.log() - self.sigma.log())


@dataclass(frozen=True, eq=False)
class Denoiser:
    """model: as for `diffkern.sample`, called as model(x, timestep) or model(x, timestep, labels). schedule: what it
    was trained with. device: of the model. dtype: what it is given, None for what x_t is in."""

    model: Model
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def of(cls, model: Any, schedule: Schedule | None = None) -> Denoiser:
        """model: a Denoiser, a `Diffusion`, or a callable with its schedule. One that is no module is called on the CPU
        in the dtype of x_t. Raises ValueError for a callable without a schedule, or a schedule of less than 2
        timesteps."""
        if isinstance(model, Denoiser):
            return model
        if isinstance(model, Diffusion):
            model, schedule = model.model, model.schedule
        if schedule is None:
            raise ValueError("give the schedule that the model was trained with: schedule=")
        if len(schedule) < 2:
            raise ValueError(f"a likelihood needs a schedule of at least 2 timesteps, not {len(schedule)}")
        device, dtype = placement(model)
        return cls(model, schedule, device, dtype if isinstance(model, torch.nn.Module) else None)

    @cached_property
    def _table(self) -> Tensor:
        """float64 [4, T] on the device: alpha_t, sigma_t, what the model is told, log(sigma_t / alpha_t), as the
        samplers have it where alpha_t = 0."""
        s = self.schedule
        level = s.sigma_t.log() - s.alpha_t.clamp(min=SMALLEST_ALPHA[s.path]).log()
        return torch.stack([s.alpha_t, s.sigma_t, s.times, level]).to(self.device)

    @property
    def angles(self) -> tuple[float, float]:
        """The angle of the schedule's first and last timestep."""
        alpha, sigma = self.schedule.alpha_t[[0, -1]], self.schedule.sigma_t[[0, -1]]
        first, last = torch.atan2(sigma, alpha).tolist()
        return first, last

    def at(self, timestep: Tensor) -> Levels:
        """The levels of the schedule's own timesteps: int64 [B]."""
        alpha, sigma, time, _ = self._table[:, timestep.to(self.device)]
        return Levels(alpha, sigma, time)

    def at_angle(self, angle: Tensor) -> Levels:
        """The levels at angles: float64 [B] within `angles`. Between two timesteps of a variance-preserving schedule
        the model is told what lies between them in log(sigma_t / alpha_t), as the samplers do."""
        angle = angle.to(self.device, torch.float64)
        cos, sin = torch.cos(angle), torch.sin(angle)
        match self.schedule.path:
            case "flow":
                return Levels(cos / (cos + sin), sin / (cos + sin), len(self.schedule) * sin / (cos + sin))
            case "ve":
                return Levels(torch.ones_like(angle), sin / cos, (sin / cos).log() / 4)
        times, levels = self._table[2], self._table[3]
        level = sin.log() - cos.clamp(min=torch.finfo(torch.float64).tiny).log()
        above = torch.searchsorted(levels, level).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        share = ((level - low) / (high - low)).clamp(0, 1)
        return Levels(cos, sin, torch.lerp(times[above - 1], times[above], share))

    def output(self, x_t: Tensor, levels: Levels, labels: Tensor | None = None) -> Tensor:
        """What the model puts out, in the dtype of x_t: [B, ...]."""
        inputs, time = x_t, levels.time
        if self.schedule.path == "ve":  # c_in of Karras et al. 2022, table 1
            inputs = per_sample((levels.sigma**2 + self.schedule.sigma_data**2) ** -0.5, x_t).to(x_t.dtype) * x_t
        if self.dtype is not None:
            inputs, time = inputs.to(self.dtype), time.to(torch.float32)
        told = (inputs, time) if labels is None else (inputs, time, labels)
        return self.model(*told).to(x_t.dtype)

    def predict(self, x_t: Tensor, levels: Levels, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x_0, epsilon) as the model predicts them, in the dtype of x_t. x_t: [B, ...], on the model's device."""
        m = self.output(x_t, levels, labels)
        x0, epsilon = self._solved(levels)
        return _combined(x_t, m, *x0), _combined(x_t, m, *epsilon)

    def x0_weights(self, levels: Levels) -> tuple[Tensor, Tensor]:
        """(a, b) of x_0 = a x_t + b m, float64 [B] each: those of `Schedule.x0_weights`, at each sample's level."""
        return self._solved(levels)[0]

    def _solved(self, levels: Levels) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(a, b) of x_0 = a x_t + b m, and of epsilon."""
        alpha, sigma = levels.alpha, levels.sigma
        u, w = PREDICTIONS[self.schedule.prediction](alpha, sigma, self.schedule.sigma_data)
        det = alpha * w - sigma * u  # of (x_t, m) as functions of (x_0, epsilon)
        return (w / det, -sigma / det), (-u / det, alpha / det)

    def velocity(self, x_t: Tensor, levels: Levels, labels: Tensor | None = None) -> Tensor:
        """d(x_t / r) / d(angle) = cos(angle) epsilon - sin(angle) x_0 along the probability-flow ODE (Song et al. 2021,
        eq. 13, in the angle). Well conditioned for v and flow prediction at both ends."""
        m = self.output(x_t, levels, labels)
        alpha, sigma, r = levels.alpha, levels.sigma, levels.radius
        u, w = PREDICTIONS[self.schedule.prediction](alpha, sigma, self.schedule.sigma_data)
        det = r * (alpha * w - sigma * u)
        # (alpha epsilon - sigma x_0) / r, with both solved for from x_t and m
        return _combined(x_t, m, -(alpha * u + sigma * w) / det, r**2 / det)


def _combined(x: Tensor, m: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b m, in the dtype of x. a, b: [B]."""
    return per_sample(a, x).to(x.dtype) * x + per_sample(b, x).to(x.dtype) * m

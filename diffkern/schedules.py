"""Noise schedules: the alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t epsilon, in float64 on the CPU.

Three paths from data to noise: variance preserving, alpha^2 + sigma^2 = 1 (Ho et al. 2020; Kingma et al. 2021);
variance exploding, alpha = 1 (Karras et al. 2022, "EDM"); and the straight line of rectified flow, alpha + sigma = 1
(Lipman et al. 2023; Liu et al. 2023). The index t runs from 0 (data) to T - 1 (noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, overload

import torch
from torch import Tensor

from diffkern.check import rows_known
from diffkern.layout import accumulate, per_sample, rows_of
from diffkern.ops.add_noise import add_noise
from diffkern.ops.randn import Draw

PATHS = ("vp", "ve", "flow")
SPACINGS = ("linspace", "leading", "trailing", "karras", "exponential")

# What a model's output m is, as weights (u, w) of m = u x_0 + w epsilon, given alpha, sigma and EDM's sigma_data.
PREDICTIONS: dict[str, Callable[[Any, Any, float], tuple[Any, Any]]] = {
    "epsilon": lambda alpha, sigma, _: (0.0 * sigma, 1.0 + 0.0 * sigma),  # Ho et al. 2020, eq. 14
    "x0": lambda alpha, sigma, _: (1.0 + 0.0 * sigma, 0.0 * sigma),
    "v": lambda alpha, sigma, _: (-sigma, alpha),  # Salimans & Ho 2022, section 4
    "flow": lambda alpha, sigma, _: (-1.0 + 0.0 * sigma, 1.0 + 0.0 * sigma),  # Lipman et al. 2023, time 1 is noise
    "edm": lambda alpha, sigma, data: (  # F of D(x) = c_skip x + c_out F(c_in x, c_noise): Karras et al. 2022, table 1
        sigma / data / (sigma**2 + data**2) ** 0.5,
        -data / (sigma**2 + data**2) ** 0.5,
    ),
}


def x0_weights(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """(a, b) of x_0 = a x + b m for a model that predicts one of PREDICTIONS; not finite where m does not give x_0."""
    u, w = PREDICTIONS[prediction](alpha, sigma, sigma_data)
    det = alpha * w - sigma * u  # of (x, m) as functions of (x_0, epsilon)
    return (w / det, -sigma / det) if det else (math.inf, math.inf)


def epsilon_weights(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """(a, b) of epsilon = a x + b m for a model that predicts one of PREDICTIONS."""
    u, w = PREDICTIONS[prediction](alpha, sigma, sigma_data)
    det = alpha * w - sigma * u
    return (-u / det, alpha / det) if det else (math.inf, math.inf)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule and what the model trained with it predicts.

    alpha_t, sigma_t: float64 [T]. prediction: a key of PREDICTIONS. path: one of PATHS. spacing, steps_offset: which
    timesteps a sampler takes unless told otherwise (Lin et al. 2024, table 2; offset only for "leading").
    clip: the bound that samplers put on |x_0|, infinite for none. shift: of a flow (Esser et al. 2024, eq. 23).
    sigma_data, rho: EDM's. Raises ValueError for anything not of these."""

    alpha_t: Tensor = field(repr=False)
    sigma_t: Tensor = field(repr=False)
    prediction: str = "epsilon"
    path: str = "vp"
    spacing: str = "trailing"
    steps_offset: int = 0
    clip: float = math.inf
    shift: float = 1.0
    sigma_data: float = 0.5
    rho: float = 7.0

    def __post_init__(self) -> None:
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("path", self.path, PATHS)
        one_of("spacing", self.spacing, SPACINGS)
        a, s = self.alpha_t, self.sigma_t
        if a.dtype != torch.float64 or s.dtype != torch.float64 or a.dim() != 1 or a.shape != s.shape or len(a) < 1:
            raise ValueError("alpha_t and sigma_t must be float64 vectors of one length T >= 1")
        if not (torch.isfinite(a).all() and torch.isfinite(s).all() and (a >= 0).all() and (s > 0).all()):
            raise ValueError("alpha_t must be finite and >= 0, sigma_t finite and > 0")
        if (a[1:] * s[:-1] >= a[:-1] * s[1:]).any():
            raise ValueError("the signal-to-noise ratio alpha_t / sigma_t must fall with t")
        if (self.prediction == "edm") != (self.path == "ve"):
            raise ValueError("prediction 'edm' and path 've' go together: EDM preconditions a model for alpha_t = 1")
        for name in ("clip", "shift", "sigma_data", "rho"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, not {getattr(self, name)}")

    def __len__(self) -> int:
        return len(self.alpha_t)

    @cached_property
    def alpha_sigma(self) -> Tensor:
        """float32 [T, 2]: the table that the op `add_noise` looks timesteps up in."""
        return torch.stack([self.alpha_t, self.sigma_t], dim=1).to(torch.float32)

    @cached_property
    def _on_device(self) -> dict[torch.device, Tensor]:
        return {}

    @property
    def lambda_t(self) -> Tensor:
        """float64 [T]: log(alpha_t / sigma_t), half the log signal-to-noise ratio; -inf where alpha_t = 0."""
        return torch.log(self.alpha_t) - torch.log(self.sigma_t)

    @property
    def times(self) -> Tensor:
        """float64 [T]: what the model is told at t: the index t (vp), T sigma_t (flow) or log(sigma_t) / 4 (EDM's
        c_noise)."""
        match self.path:
            case "flow":
                return self.sigma_t * len(self)
            case "ve":
                return self.sigma_t.log() / 4
        return torch.arange(len(self), dtype=torch.float64)

    def c_in(self, sigma: float) -> float:
        """What x is scaled by before the model sees it: 1, or EDM's scaling to unit variance."""
        return (sigma**2 + self.sigma_data**2) ** -0.5 if self.path == "ve" else 1.0

    def x0_weights(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(a, b) of x_0 = a x + b m at a noise level; not finite where the prediction does not give x_0 (epsilon at
        alpha = 0). For EDM these are c_skip and c_out."""
        return x0_weights(self.prediction, alpha, sigma, self.sigma_data)

    def epsilon_weights(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(a, b) of epsilon = a x + b m at a noise level."""
        return epsilon_weights(self.prediction, alpha, sigma, self.sigma_data)

    @overload
    def add_noise(
        self, x0: Tensor, timestep: Tensor, keys: Tensor, return_noise: Literal[False] = False, draw: int = ...
    ) -> Tensor: ...
    @overload
    def add_noise(
        self, x0: Tensor, timestep: Tensor, keys: Tensor, return_noise: Literal[True], draw: int = ...
    ) -> tuple[Tensor, Tensor]: ...
    def add_noise(
        self, x0: Tensor, timestep: Tensor, keys: Tensor, return_noise: bool = False, draw: int = int(Draw.TRAINING)
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x_t ~ q(x_t | x_0), and the noise in it if asked, in the dtype and layout of x0: [B, ...].

        timestep: int64 [B], below T: another on the CPU raises RuntimeError, on a GPU it makes x_t of that sample NaN.
        keys: int64 [B, 2], see `noise_keys`. draw: which noise of each sample."""
        if x0.device not in self._on_device:
            self._on_device[x0.device] = self.alpha_sigma.to(x0.device)
        x_t, noise = add_noise(x0, timestep, self._on_device[x0.device], keys, draw, return_noise)
        return (x_t, noise) if return_noise else x_t

    def target(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the model is trained to put out at x_t = alpha_t x0 + sigma_t noise. x0, noise: [B, ...].
        timestep: int64 [B], as for `add_noise`. Returns the shape and dtype of x0."""
        rows_known("target", "timestep", timestep, len(self))
        u, w = PREDICTIONS[self.prediction](self.alpha_t, self.sigma_t, self.sigma_data)
        acc = accumulate(x0.dtype)
        u, w = (per_sample(rows_of(v.to(timestep.device), timestep).to(acc), x0) for v in (u, w))
        return (u * x0 + w * noise).to(x0.dtype)


def one_of(what: str, name: object, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Raise ValueError, naming what is allowed, if `name` is not."""
    if name not in allowed:
        raise ValueError(f"no {what} is named {name!r}: choose one of {', '.join(allowed)}")


def from_betas(betas: Tensor, **options: Any) -> Schedule:
    """The variance-preserving schedule with alpha_t^2 = prod_{s <= t} (1 - beta_s) (Ho et al. 2020, eq. 4).
    betas: float64 [T] in (0, 1]. options: other fields of Schedule."""
    betas = betas.to(torch.float64)
    if not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"betas must be in (0, 1], but run from {betas.min().item()} to {betas.max().item()}")
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), **options)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, **options: Any) -> Schedule:
    """Linear betas (Ho et al. 2020, section 4)."""
    return from_betas(_ramp(beta_start, beta_end, T), **options)


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, **options: Any) -> Schedule:
    """Betas with linear square roots (latent diffusion: Rombach et al. 2022)."""
    return from_betas(_ramp(beta_start**0.5, beta_end**0.5, T) ** 2, **options)


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999, **options: Any) -> Schedule:
    """alpha_bar(t) = cos^2((t + s) / (1 + s) pi / 2), with capped betas (Nichol & Dhariwal 2021, eq. 17)."""
    alpha_bar = torch.cos((_ramp(0, 1, T + 1) + s) / (1 + s) * math.pi / 2) ** 2
    return from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), **options)


def sigmoid(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, **options: Any) -> Schedule:
    """Betas along a sigmoid from -6 to 6 (GeoDiff: Xu et al. 2022)."""
    return from_betas(torch.sigmoid(_ramp(-6, 6, T)) * (beta_end - beta_start) + beta_start, **options)


def edm(T: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, **options: Any) -> Schedule:
    """alpha = 1 and sigma_t^(1/rho) linear in t (Karras et al. 2022, eq. 5), for a model with EDM preconditioning."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"an EDM schedule needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    sigma = _ramp(sigma_min ** (1 / rho), sigma_max ** (1 / rho), T) ** rho
    options = {"prediction": "edm", "spacing": "karras", **options}
    return Schedule(torch.ones_like(sigma), sigma, path="ve", rho=rho, **options)


def flow(T: int = 1000, shift: float = 1.0, **options: Any) -> Schedule:
    """sigma = (t + 1) / T and alpha = 1 - sigma (Lipman et al. 2023; Liu et al. 2023), moved towards the noise by
    `shift` for high resolutions (Esser et al. 2024, eq. 23)."""
    sigma = shift_sigma((torch.arange(T, dtype=torch.float64) + 1) / T, shift)
    return Schedule(1 - sigma, sigma, path="flow", shift=shift, **{"prediction": "flow", **options})


def shift_sigma(sigma: Any, shift: float) -> Any:
    """sigma' = shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def rescale_zero_snr(schedule: Schedule) -> Schedule:
    """The schedule with alpha_{T-1} = 0 exactly and alpha_0 kept (Lin et al. 2024, algorithm 1). The model must
    predict v or x_0. Raises ValueError for a schedule that is not variance preserving."""
    if schedule.path != "vp":
        raise ValueError(f"zero terminal SNR is for variance-preserving schedules, not path {schedule.path!r}")
    first, last = schedule.alpha_t[0], schedule.alpha_t[-1]
    alpha = (schedule.alpha_t - last) * first / (first - last)
    return replace(schedule, alpha_t=alpha, sigma_t=(1 - alpha**2).sqrt())


def _ramp(start: float, end: float, n: int) -> Tensor:
    if n < 1:
        raise ValueError(f"a schedule needs T >= 1 timesteps, not {n}")
    return torch.linspace(start, end, n, dtype=torch.float64)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f for f in (linear, scaled_linear, cosine, sigmoid, edm, flow)
}


def make_schedule(name: str, T: int = 1000, **options: Any) -> Schedule:
    """The schedule of SCHEDULES with that name. Raises ValueError, naming the choices, for another name."""
    one_of("schedule", name, SCHEDULES)
    return SCHEDULES[name](T, **options)

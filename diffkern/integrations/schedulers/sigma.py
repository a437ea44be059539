"""Euler, Euler-ancestral, Heun and EDM's Euler, whose samples are x / alpha, of noise sigma; and a flow's Euler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.schedulers.fused import FusedScheduler
from diffkern.ops.sampler_step import MAKES_BASE, MAKES_HISTORY
from diffkern.samplers.euler import ancestral, euler_step
from diffkern.samplers.grid import Point, point
from diffkern.samplers.heun import average_slope
from diffkern.samplers.table import H0, H2, X0, Row, Weights, X
from diffkern.scheduler_config import PREDICTION_TYPES
from diffkern.schedules import x0_weights


class IndexedScheduler(FusedScheduler):
    """A scheduler that counts its steps, with a sigma for each. The first index is found by diffusers."""

    config: Any
    begin_index: int | None
    _step_index: Any
    path = "vp"

    def is_regular(self, call: dict[str, Any]) -> bool:
        return getattr(self, "num_inference_steps", None) is not None

    def step_at(self, timestep: Any) -> int:
        if self._step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        return self._step_index

    def at(self, i: int) -> Point:
        return point(self.path, self.levels.sigmas[i])

    def noise_levels(self) -> list[Point]:
        return [self.at(i) for i in range(len(self.levels.sigmas))]

    def indices(self, timesteps: Tensor) -> Tensor:
        """int64 [B]: the steps of timesteps; with a begin index, the step that the run is at."""
        if self.begin_index is not None:
            return torch.full((len(timesteps),), self.begin_index if self._step_index is None else self._step_index)
        find, known = self.index_for_timestep, self.look().host_timesteps  # type: ignore[attr-defined]
        return torch.tensor([find(t, known) for t in timesteps.tolist()])


def is_index(timestep: Any) -> bool:
    return timestep.dtype in (torch.int32, torch.int64) if isinstance(timestep, Tensor) else isinstance(timestep, int)


class AddsNoise(IndexedScheduler):
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t original_samples + sigma_t noise in one pass. original_samples, noise: [B, ...]. timesteps: [B]."""
        return self.mix(original_samples, noise, self.indices(timesteps))


class SigmaScheduler(AddsNoise):
    """The state is x / alpha, so that add_noise leaves the sample its scale."""

    is_scale_input_called: bool

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        kinds = ("epsilon", "v_prediction", *(() if issubclass(cls, EulerAncestral) else ("sample",)))
        kind = scheduler.config.prediction_type
        if kind in kinds or (kind == "original_sample" and issubclass(cls, Euler)):
            return None
        return f"prediction_type must be {', '.join(kinds[:-1])} or {kinds[-1]}, not {kind!r}"

    def is_regular(self, call: dict[str, Any]) -> bool:
        # diffusers refuses an index for a timestep, and warns of an input that was not scaled.
        return self.is_scale_input_called and not is_index(call["timestep"])

    def noise_levels(self) -> list[Point]:
        return [Point(0.0, 1.0, sigma) for sigma in self.levels.sigmas]

    def x0(self, p: Point) -> tuple[float, float]:
        kind = self.config.prediction_type
        a, b = x0_weights("x0" if kind == "original_sample" else PREDICTION_TYPES[kind], p.alpha, p.sigma)
        return a * p.alpha, b


class Euler(SigmaScheduler):
    output = "EulerDiscreteSchedulerOutput"

    def fused_step(
        self, *, model_output: Tensor, timestep: Any, sample: Tensor, s_churn: float, s_tmin: float, s_tmax: float,
        s_noise: float, generator: Any, **_: Any,
    ) -> Any:  # fmt: skip
        i = self.step_at(timestep)
        sigmas = self.levels.sigmas
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigmas[i] <= s_tmax else 0.0
        if gamma > 0 and self.counter_seed is not None:
            raise ValueError("s_churn must be 0 with counter noise: the prediction of x0 needs the noise before the op")

        def make() -> Row:
            raised = sigmas[i] * (1 + gamma)
            # As diffusers, v is taken at the level that the model was told of, all else at the raised one.
            a, b = self.x0(self.at(i) if self.config.prediction_type == "v_prediction" else point(self.path, raised))
            step = euler_step(raised, sigmas[i + 1])
            # The model saw x without the noise that raises its level, so x0 = a (x + noise) + b m.
            noise = s_noise * (raised**2 - sigmas[i] ** 2) ** 0.5
            in_next = noise * (step["x"] + a * step["x0"])
            return Row(0.0, (a, b), step, noise=in_next, push=X0 + a * noise * H2)

        noise = self.draw_noise(model_output, generator, model_output.dtype) if gamma > 0 else None
        done = self.apply(
            (i, gamma, s_noise), make, model_output, sample,
            dtype=model_output.dtype, also=MAKES_HISTORY, noise=noise,
        )  # fmt: skip
        self._step_index += 1
        return done.prev_sample, done.history


class EDMEuler(Euler):
    """alpha is 1, and the output that of EDM's preconditioned network."""

    output = "EDMEulerSchedulerOutput"
    path = "ve"

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        return edm_reason(scheduler.config)

    def is_regular(self, call: dict[str, Any]) -> bool:
        return super().is_regular(call) and call.get("pred_original_sample") is None

    def x0(self, p: Point) -> tuple[float, float]:
        return edm_x0(self.config, p)


def edm_reason(config: Any) -> str | None:
    if config.prediction_type not in ("epsilon", "v_prediction"):
        return f"prediction_type must be epsilon or v_prediction, not {config.prediction_type!r}"
    return None


def edm_x0(config: Any, p: Point) -> tuple[float, float]:
    """c_skip and c_out (Karras et al. 2022, table 1); diffusers' v prediction is the output's negative."""
    a, b = x0_weights("edm", p.alpha, p.sigma, config.sigma_data)
    return a, b if config.prediction_type == "epsilon" else -b


class EulerAncestral(SigmaScheduler):
    output = "EulerAncestralDiscreteSchedulerOutput"

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any, **_: Any) -> Any:
        i = self.step_at(timestep)

        def make() -> Row:
            p = self.at(i)
            down, up = ancestral(self.levels.sigmas[i], self.levels.sigmas[i + 1])
            return Row(0.0, self.x0(p), euler_step(self.levels.sigmas[i], down), noise=up, push=X0)

        noise = self.draw_noise(model_output, generator, model_output.dtype)
        dtype = model_output.dtype
        done = self.apply(i, make, model_output, sample, dtype=dtype, also=MAKES_HISTORY, noise=noise, draw=i + 1)
        self._step_index += 1
        return done.prev_sample, done.history


class Heun(SigmaScheduler):
    """Two calls a step. The first slope is kept, not only where it leads, so that a sample may be edited between."""

    output = "HeunDiscreteSchedulerOutput"
    prev_derivative: Tensor | None
    dt: Any
    sample: Tensor | None

    def is_regular(self, call: dict[str, Any]) -> bool:
        return True

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
        i = self.step_at(timestep)
        sigmas, first = self.levels.sigmas, self.dt is None
        s, t = (sigmas[i], sigmas[i + 1]) if first else (sigmas[i - 1], sigmas[i])

        def make() -> Row:
            next: Weights = euler_step(s, t) if first else average_slope(s, t, (t - s) * H0)
            clip = float(self.config.clip_sample_range) if self.config.clip_sample else math.inf
            # The slope goes to the history, and x0, for the output, to the base.
            slope = (X - X0) / (s if first else t)
            return Row(0.0, self.x0(point(self.path, s if first else t)), next, push=slope, base=X0, clip=clip)

        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        also = MAKES_BASE | MAKES_HISTORY if first else MAKES_BASE
        past: dict[str, Any] = {} if first else {"base": self.sample, "h0": self.prev_derivative}
        done = self.apply((i, first), make, model_output, sample, dtype=dtype, wide=False, also=also, **past)
        self.prev_derivative, self.dt, self.sample = (done.history, t - s, sample) if first else (None, None, None)
        self._step_index += 1
        return done.prev_sample, done.base.to(dtype)


class FlowMatchEuler(IndexedScheduler):
    """Along the straight line of a flow, where alpha is 1 - sigma."""

    output = "FlowMatchEulerDiscreteSchedulerOutput"
    path = "flow"

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        return None

    def is_regular(self, call: dict[str, Any]) -> bool:
        # diffusers refuses an index for a timestep.
        return call.get("per_token_timesteps") is None and not is_index(call["timestep"])

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any, **_: Any) -> Any:
        i = self.step_at(timestep)
        dtype, wide = model_output.dtype, torch.promote_types(model_output.dtype, torch.float32)
        if self.config.get("stochastic_sampling"):  # to the data, and back with fresh noise

            def make() -> Row:
                p, t = self.at(i), self.at(i + 1)
                return Row(0.0, x0_weights("flow", p.alpha, p.sigma), t.alpha * X0, noise=t.sigma)

            noise = self.draw_noise(model_output, generator, torch.float32)
            prev = self.apply(i, make, model_output, sample, dtype=dtype, wide=False, noise=noise, draw=i + 1)[0]
        else:
            # The output is the slope itself: one addition, which needs no row.
            step = self.levels.sigmas[i + 1] - self.levels.sigmas[i]
            prev = torch.add(sample.to(wide), model_output, alpha=step).to(dtype)
        self._step_index += 1
        return (prev,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma_t) sample + sigma_t noise in one pass. sample, noise: [B, ...]. timestep: [B]."""
        return self.mix(sample, noise, self.indices(timestep))

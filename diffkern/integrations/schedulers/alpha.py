"""DDPM, DDIM, PNDM and LCM: diffusers' schedulers that look alphas_cumprod up by the timestep."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.schedulers.fused import FusedScheduler
from diffkern.ops.sampler_step import MAKES_HISTORY
from diffkern.samplers.ddpm import ddim_step, posterior
from diffkern.samplers.grid import Point
from diffkern.samplers.lcm import consistency
from diffkern.samplers.plms import adams_bashforth, transfer
from diffkern.samplers.table import H0, H1, X0, M, Row, Weights, X
from diffkern.scheduler_config import PREDICTION_TYPES
from diffkern.schedules import epsilon_weights, x0_weights


class AlphaScheduler(FusedScheduler):
    """x0, clipping and add_noise by alphas_cumprod."""

    config: Any
    timesteps: Any
    num_inference_steps: int | None

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        config = scheduler.config
        if config.get("thresholding"):
            return "thresholding must be False: dynamic thresholding is no linear combination"
        kinds = ("epsilon", "v_prediction") if issubclass(cls, PNDM) else ("epsilon", "sample", "v_prediction")
        if config.prediction_type not in kinds:
            return f"prediction_type must be {', '.join(kinds[:-1])} or {kinds[-1]}, not {config.prediction_type!r}"
        if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
            return "rescale_betas_zero_snr needs prediction_type sample or v_prediction: epsilon gives no x0 there"
        return None

    def is_regular(self, call: dict[str, Any]) -> bool:
        return self.num_inference_steps is not None

    def noise_levels(self) -> list[Point]:
        return [self.at(t) for t in range(len(self.levels.alphas_cumprod))]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t original_samples + sigma_t noise in one pass. original_samples, noise: [B, ...]. timesteps: [B]."""
        return self.mix(original_samples, noise, timesteps)

    def at(self, t: int) -> Point:
        """The point at a timestep; before timestep 0 the final one."""
        alpha_bar = self.levels.alphas_cumprod[t] if t >= 0 else self.levels.final_alpha_cumprod
        return Point(float(t), alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    def on_host(self, timestep: Any) -> int:
        """A timestep as a number. One that iteration over `timesteps` gave is known by its address, without waiting for
        its device."""
        if isinstance(timestep, Tensor) and _is_view(timestep, self.timesteps):
            return int(self.levels.timesteps[timestep.storage_offset() - self.timesteps.storage_offset()])
        return int(timestep)

    def row(self, p: Point, next: Weights, **fields: Any) -> Row:
        kind = PREDICTION_TYPES[self.config.prediction_type]
        clip = float(self.config.clip_sample_range) if self.config.get("clip_sample") else math.inf
        return Row(p.timestep, x0_weights(kind, p.alpha, p.sigma), next, clip=clip, **fields)


def _is_view(element: Tensor, of: Any) -> bool:
    return isinstance(of, Tensor) and element.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


class DDPM(AlphaScheduler):
    output = "DDPMSchedulerOutput"
    custom_timesteps: bool
    variance_type: str

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        if scheduler.variance_type in ("learned", "learned_range", "fixed_large_log"):
            return f"variance_type must be fixed_small, fixed_small_log or fixed_large, not {scheduler.variance_type!r}"
        return super().why_not(scheduler)

    def is_regular(self, call: dict[str, Any]) -> bool:
        return True  # before set_timesteps every timestep is visited

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any, **_: Any) -> Any:
        t = self.on_host(timestep)

        def make() -> Row:
            after = self._next(t)
            beta = self._beta(t, after)
            p = self.at(t)
            mean, variance = posterior(p, self.at(after), beta)
            if self.variance_type == "fixed_large":
                variance = beta
            # diffusers keeps the variance above 1e-20, for its logarithm.
            return self.row(p, mean, noise=max(variance, 1e-20) ** 0.5 if t > 0 else 0.0, push=X0)

        noise = self.draw_noise(model_output, generator, model_output.dtype) if t > 0 else None
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        draw = self._step_number(t) if t > 0 else 0
        done = self.apply(
            t, make, model_output, sample, dtype=dtype, wide=False, also=MAKES_HISTORY, noise=noise, draw=draw
        )
        return done.prev_sample, done.history.to(dtype)

    def _next(self, t: int) -> int:
        if not (self.custom_timesteps or self.num_inference_steps):
            return t - 1
        after = self._step_number(t)
        return int(self.levels.timesteps[after]) if after < len(self.levels.timesteps) else -1

    def _beta(self, t: int, after: int) -> float:
        """1 - alpha_bar_t / alpha_bar_s in float32 as diffusers has it: of neighbouring timesteps that is hardly more
        than the last digits of a number near 1, which are to be the same."""
        assert self.levels.host_alphas_cumprod is not None
        alphas_cumprod = self.levels.host_alphas_cumprod.numpy()  # whose numbers keep their dtype
        return float(1 - alphas_cumprod[t] / (alphas_cumprod[after] if after >= 0 else 1.0))

    def _step_number(self, t: int) -> int:
        return self.levels.timesteps.index(t) + 1


class DDIM(AlphaScheduler):
    output = "DDIMSchedulerOutput"

    def is_regular(self, call: dict[str, Any]) -> bool:
        return super().is_regular(call) and (call["variance_noise"] is None or call["generator"] is None)

    def fused_step(
        self, *, model_output: Tensor, timestep: Any, sample: Tensor, eta: float, use_clipped_model_output: bool,
        generator: Any, variance_noise: Tensor | None, **_: Any,
    ) -> Any:  # fmt: skip
        t = self.on_host(timestep)

        def make() -> Row:
            assert self.num_inference_steps is not None
            p, s = self.at(t), self.at(t - self.config.num_train_timesteps // self.num_inference_steps)
            a, b = epsilon_weights(PREDICTION_TYPES[self.config.prediction_type], p.alpha, p.sigma)
            epsilon = (X - p.alpha * X0) / p.sigma if use_clipped_model_output else a * X + b * M
            x, std = ddim_step(p, s, epsilon, eta)
            return self.row(p, x, noise=std, push=X0)

        noise = variance_noise if eta > 0 else None
        if eta > 0 and noise is None:
            noise = self.draw_noise(model_output, generator, model_output.dtype)
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        key = (t, eta, bool(use_clipped_model_output))
        draw = self.levels.timesteps.index(t) + 1 if eta > 0 and noise is None else 0
        done = self.apply(
            key, make, model_output, sample, dtype=dtype, wide=False, also=MAKES_HISTORY, noise=noise, draw=draw
        )
        return done.prev_sample, done.history.to(dtype)


class LCM(AlphaScheduler):
    output = "LCMSchedulerOutput"
    _step_index: int

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any, **_: Any) -> Any:
        if self._step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        i, t, times = self._step_index, self.on_host(timestep), self.levels.timesteps
        last = i == self.num_inference_steps - 1  # type: ignore[operator]

        def make() -> Row:
            p, s = self.at(t), self.at(int(times[i + 1]) if i + 1 < len(times) else t)
            x0 = consistency(t, self.config.timestep_scaling)
            return self.row(p, x0 if last else s.alpha * x0, noise=0.0 if last else s.sigma, push=x0)

        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        noise = None if last else self.draw_noise(model_output, generator, dtype)
        draw = 0 if last else i + 1
        done = self.apply(
            (i, t), make, model_output, sample, dtype=dtype, wide=False, also=MAKES_HISTORY, noise=noise, draw=draw
        )
        self._step_index += 1
        return done.prev_sample, done.history.to(dtype)


class PNDM(AlphaScheduler):
    """The average of model outputs takes the place of the output in a DDIM step."""

    ets: list[Tensor]
    counter: int
    prk_timesteps: Any
    cur_sample: Tensor | None
    cur_model_output: Any

    def is_regular(self, call: dict[str, Any]) -> bool:
        return super().is_regular(call) and (self.config.skip_prk_steps or self._in_warm_up() or len(self.ets) >= 3)

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
        step = self._runge_kutta if self._in_warm_up() else self._multistep
        done = step(self.on_host(timestep), model_output, sample)
        self.counter += 1
        return (done,)

    def _in_warm_up(self) -> bool:
        return self.counter < len(self.prk_timesteps) and not self.config.skip_prk_steps

    def _runge_kutta(self, t: int, m: Tensor, x: Tensor) -> Tensor:
        """A quarter of a Runge-Kutta step: the next evaluation point, or the step by the weighted average."""
        stage = self.counter % 4
        start, end = int(self.prk_timesteps[self.counter // 4 * 4]), t - (0 if stage % 2 else self._stride() // 2)
        if stage == 0:
            self.ets.append(m)
            self.cur_sample = x
        so_far = self.cur_model_output if isinstance(self.cur_model_output, Tensor) else torch.zeros_like(m)

        def make() -> Row:
            # The first and the last of the four weigh 1/6; H1 is the sample that the step starts from.
            p, total = self.at(start), H0 + M / (3 if stage in (1, 2) else 6)
            return self.row(p, transfer(self._kind(), p, self.at(end), H1, total if stage == 3 else M), push=total)

        dtype = torch.promote_types(m.dtype, x.dtype)
        done = self.apply(
            ("prk", self.counter, t), make, m, x,
            dtype=dtype, wide=False, also=MAKES_HISTORY, h0=so_far, h1=self.cur_sample,
        )  # fmt: skip
        self.cur_model_output = 0 if stage == 3 else done.history
        return done.prev_sample

    def _multistep(self, t: int, m: Tensor, x: Tensor) -> Tensor:
        repeats = self.counter == 1  # the first step, by the trapezoidal rule and from where it started
        past = self.ets if repeats else self.ets[-3:]
        trapezoidal = repeats and len(past) == 1
        start = t + self._stride() if repeats else t
        if repeats and not trapezoidal:  # after a warm-up that was set by hand, diffusers leaves this output out
            m, past = past[-1], past[:-1]
        order = len(past) + 1

        def make() -> Row:
            p, s = self.at(start), self.at(start - self._stride())
            mean = (M + H0) / 2 if trapezoidal else adams_bashforth(order, M)
            return self.row(p, transfer(self._kind(), p, s, H1 if trapezoidal else X, mean))

        tensors = [past[-1], self.cur_sample] if trapezoidal else [*reversed(past)]
        slots: dict[str, Any] = dict(zip(("h0", "h1", "h2"), tensors, strict=False))
        dtype = torch.promote_types(m.dtype, x.dtype)
        done = self.apply(("plms", start, order, trapezoidal), make, m, x, dtype=dtype, wide=False, **slots)
        if self.counter == 0 and order == 1:
            self.cur_sample = x
        elif trapezoidal:
            self.cur_sample = None
        if not repeats:
            self.ets = [*past, m]
        return done.prev_sample

    def _kind(self) -> str:
        return PREDICTION_TYPES[self.config.prediction_type]

    def _stride(self) -> int:
        assert self.num_inference_steps is not None
        return self.config.num_train_timesteps // self.num_inference_steps

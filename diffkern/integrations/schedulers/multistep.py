"""DPM-Solver and DEIS: diffusers' schedulers that keep past predictions, of x0 or of the noise.

A solver in the noise prediction is that in the data prediction with alpha and sigma exchanged (`_mirrored`): the ODE is
the same for both, in lambda and in -lambda.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.schedulers.fused import Result
from diffkern.integrations.schedulers.sigma import AddsNoise, edm_reason, edm_x0
from diffkern.ops.sampler_step import MAKES_HISTORY
from diffkern.samplers.deis import deis_step
from diffkern.samplers.dpm_solver import slopes_of_past, solver_step
from diffkern.samplers.grid import Point
from diffkern.samplers.table import BASE, H0, H1, X0, M, Row, Weights, X
from diffkern.scheduler_config import PREDICTION_TYPES
from diffkern.schedules import epsilon_weights, x0_weights


def _mirrored(p: Point) -> Point:
    return Point(p.timestep, p.sigma, p.alpha)


class MultistepScheduler(AddsNoise):
    model_outputs: list[Any]
    lower_order_nums: int
    timesteps: Tensor

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        config = scheduler.config
        if config.thresholding:
            return "thresholding must be False: dynamic thresholding is no linear combination"
        if config.solver_order not in (1, 2, 3):
            return f"solver_order must be 1, 2 or 3, not {config.solver_order}"
        if config.get("variance_type") in ("learned", "learned_range"):
            return f"variance_type must be None or fixed, not {config.variance_type!r}"
        return cls.prediction_reason(scheduler)

    @classmethod
    def prediction_reason(cls, scheduler: Any) -> str | None:
        config = scheduler.config
        if config.prediction_type not in PREDICTION_TYPES:
            return f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {config.prediction_type!r}"
        if config.prediction_type == "flow_prediction":
            if not config.get("use_flow_sigmas"):
                return "prediction_type flow_prediction needs use_flow_sigmas=True"
            if cls.predicts_noise(scheduler) and not issubclass(cls, DEIS):
                return "prediction_type flow_prediction needs a solver in the data prediction"
        return None

    @staticmethod
    def predicts_noise(scheduler: Any) -> bool:
        """Whether the past predictions are of the noise."""
        return False

    @property
    def path(self) -> str:  # type: ignore[override]
        return "flow" if self.config.get("use_flow_sigmas") else "vp"

    def x0(self, p: Point) -> tuple[float, float]:
        return x0_weights(PREDICTION_TYPES[self.config.prediction_type], p.alpha, p.sigma)

    def newest(self, p: Point) -> Weights:
        """The prediction that a call at p adds to the past ones."""
        if not self.predicts_noise(self):
            return X0
        a, b = epsilon_weights(PREDICTION_TYPES[self.config.prediction_type], p.alpha, p.sigma)
        return a * X + b * M

    def nodes(self, i: int, count: int) -> list[Point]:
        """The points of step i, the one before it, ..."""
        points = [self.at(i - j) for j in range(count)]
        return [_mirrored(p) for p in points] if self.predicts_noise(self) else points

    def target(self, i: int) -> Point:
        """The point that step i leads to."""
        t = self.at(i + 1)
        return _mirrored(t) if self.predicts_noise(self) else t

    def remember(self, done: Result) -> None:
        self.model_outputs = [*self.model_outputs[1:], done.history]

    def past(self, count: int) -> dict[str, Any]:
        """The past predictions that a step reads."""
        return {f"h{j}": self.model_outputs[-1 - j] for j in range(count)}


class DPMSolver(MultistepScheduler):
    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        config = scheduler.config
        if config.algorithm_type == "sde-dpmsolver" and config.solver_order > 2:
            return "algorithm_type sde-dpmsolver needs solver_order 1 or 2, as in diffusers"
        return super().why_not(scheduler)

    @staticmethod
    def predicts_noise(scheduler: Any) -> bool:
        return scheduler.config.algorithm_type in ("dpmsolver", "sde-dpmsolver")

    def fused_step(
        self, *, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any,
        variance_noise: Tensor | None = None, **_: Any,
    ) -> Any:  # fmt: skip
        i = self.step_at(timestep)
        order = self._order(i)
        dtype, noise, draw = torch.promote_types(model_output.dtype, sample.dtype), None, 0
        if self.config.algorithm_type.startswith("sde"):
            noise = variance_noise
            if noise is None:
                noise = self.draw_noise(model_output, generator, self.noise_dtype(model_output, sample))
            draw = i + 1
        done = self.apply(
            (i, order), lambda: self._row_of(i, order), model_output, sample,
            dtype=dtype, also=MAKES_HISTORY, noise=noise, draw=draw, **self.past(order - 1),
        )  # fmt: skip
        self.remember(done)
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return (done.prev_sample,)

    def noise_dtype(self, m: Tensor, x: Tensor) -> torch.dtype:
        return torch.float32

    def _order(self, i: int) -> int:
        config, left = self.config, len(self.timesteps) - i
        few = config.lower_order_final and len(self.timesteps) < 15
        if left == 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        return min(config.solver_order, self.lower_order_nums + 1, 2 if left == 2 and few else 3)

    def _row_of(self, i: int, order: int) -> Row:
        sde, p, t = self.config.algorithm_type.startswith("sde"), self.at(i), self.target(i)
        (s, *older), newest = self.nodes(i, order), self.newest(p)
        slopes = slopes_of_past(s, t, older, newest)
        exact = order > 2 or self.config.solver_type == "heun"
        if sde and self.predicts_noise(self):
            # Twice the ODE's move along the noise (Lu et al. 2022, appendix), and the noise that makes up for it.
            x, _ = solver_step(s, t, X, 2 * newest, [2 * slope for slope in slopes], exact=exact)
            h = s.lam - t.lam
            noise = t.alpha * math.expm1(2 * h) ** 0.5
        else:
            # diffusers subtracts 1/2 from the SDE's curvature where Taylor's series has it added.
            x, noise = solver_step(s, t, X, newest, slopes, exact=exact, sde=sde, curvature_shift=-0.5 if sde else 0.5)
        return Row(0.0, self.x0(p), x, noise=noise, push=newest)


class EDMDPMSolver(DPMSolver):
    """alpha is 1, and the output that of EDM's preconditioned network."""

    path = "ve"

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        if scheduler.config.algorithm_type == "sde-dpmsolver++" and scheduler.config.solver_order > 2:
            return "algorithm_type sde-dpmsolver++ needs solver_order 1 or 2, as in diffusers"
        return super().why_not(scheduler)

    @classmethod
    def prediction_reason(cls, scheduler: Any) -> str | None:
        return edm_reason(scheduler.config)

    def x0(self, p: Point) -> tuple[float, float]:
        return edm_x0(self.config, p)

    def noise_levels(self) -> list[Point]:
        return [Point(0.0, 1.0, sigma) for sigma in self.levels.sigmas]

    def noise_dtype(self, m: Tensor, x: Tensor) -> torch.dtype:
        return torch.promote_types(m.dtype, x.dtype)


class DPMSolverSinglestep(MultistepScheduler):
    """Steps over two or three calls, each from where the first started: `base`."""

    order_list: list[int]
    sample: Tensor | None

    @staticmethod
    def predicts_noise(scheduler: Any) -> bool:
        return scheduler.config.algorithm_type == "dpmsolver"

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any, **_: Any) -> Any:
        i = self.step_at(timestep)
        order = self.order_list[i]
        # A run that starts within a step has fewer predictions than the step would like.
        order = min(order, 1 + sum(m is not None for m in self.model_outputs[1:]))
        if order == 1:
            self.sample = sample
        dtype, noise, draw = torch.promote_types(model_output.dtype, sample.dtype), None, 0
        if self.config.algorithm_type == "sde-dpmsolver++":
            noise = self.draw_noise(model_output, generator, dtype)
            draw = i + 1
        done = self.apply(
            (i, order), lambda: self._row_of(i, order), model_output, sample, dtype=dtype, also=MAKES_HISTORY,
            noise=noise, draw=draw, base=self.sample if order > 1 else None, **self.past(order - 1),
        )  # fmt: skip
        self.remember(done)
        self._step_index += 1
        return (done.prev_sample,)

    def _row_of(self, i: int, order: int) -> Row:
        p, t, nodes, newest = self.at(i), self.target(i), self.nodes(i, order), self.newest(self.at(i))
        s, exact, sde = nodes[-1], self.config.solver_type == "heun", self.config.algorithm_type.startswith("sde")
        x, first, slopes = X, newest, list[Weights]()
        if order > 1:
            x, first, slopes = BASE, (H0, H1)[order - 2], self._slopes(nodes, t, newest)
        shift = -0.5 if sde else 0.5  # as in DPMSolver
        x, noise = solver_step(s, t, x, first, slopes, exact=exact or order == 3, sde=sde, curvature_shift=shift)
        return Row(0.0, self.x0(p), x, noise=noise, push=newest)

    def _slopes(self, nodes: list[Point], t: Point, newest: Weights) -> list[Weights]:
        """The slope, and of order 3 half the curvature, at the oldest node, per step from it to t."""
        s = nodes[-1]
        r0, *rest = [(p.lam - s.lam) / (t.lam - s.lam) for p in nodes[:-1]]
        if not rest:
            return [(newest - H0) / r0]
        far, near = (newest - H1) / r0, (H0 - H1) / rest[0]
        if self.config.solver_type == "midpoint":
            return [far]
        return [(r0 * near - rest[0] * far) / (r0 - rest[0]), 2 * (far - near) / (r0 - rest[0])]


class DEIS(MultistepScheduler):
    @staticmethod
    def predicts_noise(scheduler: Any) -> bool:
        return True

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
        i = self.step_at(timestep)
        few = self.config.lower_order_final and len(self.timesteps) < 15
        order = min(self.config.solver_order, self.lower_order_nums + 1, len(self.timesteps) - i if few else 3)

        def make() -> Row:
            p = self.at(i)
            x = deis_step([self.at(i - j) for j in range(order)], self.at(i + 1), self.newest(p))
            return Row(0.0, self.x0(p), x, push=self.newest(p))

        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        done = self.apply(
            (i, order), make, model_output, sample, dtype=dtype, also=MAKES_HISTORY, **self.past(order - 1)
        )
        self.remember(done)
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return (done.prev_sample,)

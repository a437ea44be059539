"""Euler along the straight line of a flow: diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.integrations.sigma_schedulers import IndexedScheduler
from diffkern.samplers.table import X0, M, Row, X
from diffkern.schedules import x0_weights


class FlowMatchEuler(IndexedScheduler):
    output = "FlowMatchEulerDiscreteSchedulerOutput"
    path = "flow"

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        return None

    def is_regular(self, call: dict[str, Any]) -> bool:
        # diffusers refuses an index for a timestep.
        index = isinstance(call["timestep"], (int, torch.IntTensor, torch.LongTensor))
        return not index and call.get("per_token_timesteps") is None

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any, **_: Any) -> Any:
        i = self.step_at(timestep)
        stochastic = bool(self.config.get("stochastic_sampling"))

        def make() -> Row:
            p, t = self.at(i), self.at(i + 1)
            if stochastic:  # to the data, and back with fresh noise
                return Row(0.0, x0_weights("flow", p.alpha, p.sigma), t.alpha * X0, noise=t.sigma)
            # The output is the slope itself; it is not found through x0, as inverted sigmas may start at 0.
            return Row(0.0, (1.0, 0.0), X + (t.sigma - p.sigma) * M)

        noise = self.draw_noise(model_output, generator, torch.float32) if stochastic else None
        draw, dtype = i + 1 if stochastic else 0, model_output.dtype
        done = self.apply(i, make, model_output, sample, dtype=dtype, noise=noise, draw=draw)
        self._step_index += 1
        return (done.prev_sample,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma_t) sample + sigma_t noise in one pass. sample, noise: [B, ...]. timestep: [B]."""
        return self.mix(sample, noise, self.indices(timestep))

"""UniPC: diffusers' predictor-corrector, whose call at a point corrects that point and predicts the next."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffkern.integrations.schedulers.multistep import MultistepScheduler
from diffkern.ops.sampler_step import MAKES_BASE, MAKES_HISTORY
from diffkern.samplers.table import BASE, H0, H1, H2, Row, X
from diffkern.samplers.unipc import unified_step


class UniPC(MultistepScheduler):
    """last_sample, the point that was corrected last, is the base of the next correction."""

    timestep_list: list[Any]
    disable_corrector: list[int]
    last_sample: Tensor | None
    this_order: int
    predict_x0: bool

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        if scheduler.solver_p is not None:
            return "solver_p must be None: another scheduler's step is no row of this one"
        if not scheduler.predict_x0 and scheduler.config.final_sigmas_type == "zero":
            return "predict_x0=False needs final_sigmas_type sigma_min: no noise can be predicted from none"
        return super().why_not(scheduler)

    @staticmethod
    def predicts_noise(scheduler: Any) -> bool:
        return not scheduler.predict_x0

    def fused_step(self, *, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
        i = self.step_at(timestep)
        corrects = i > 0 and i - 1 not in self.disable_corrector and self.last_sample is not None
        corrected = self.this_order if corrects else 0
        order = min(self.config.solver_order, self.lower_order_nums + 1)
        if self.config.lower_order_final:
            order = min(order, len(self.timesteps) - i)
        read = max(order - 1, corrected)
        done = self.apply(
            (i, order, corrected), lambda: self._row_of(i, order, corrected), model_output, sample, dtype=sample.dtype,
            also=MAKES_BASE | MAKES_HISTORY, base=self.last_sample if corrects else None, **self.past(read),
        )  # fmt: skip
        self.remember(done)
        self.timestep_list = [*self.timestep_list[1:], timestep]
        self.this_order, self.last_sample = order, done.base
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return (done.prev_sample,)

    def _row_of(self, i: int, order: int, corrected: int) -> Row:
        p, t = self.at(i), self.target(i)
        s, *older = self.nodes(i, max(order, corrected + 1))
        newest, x, kind = self.newest(p), X, self.config.solver_type
        if corrected:
            x = unified_step(older[0], s, BASE, [H0, H1, H2], older[1:corrected], kind, corrector=newest)
        if t.sigma == 0:
            order = 1  # there x0 itself is the answer, and the higher orders divide by h = infinity
        x_next = unified_step(s, t, x, [newest, H0, H1], older[: order - 1], kind)
        return Row(0.0, self.x0(p), x_next, push=newest, base=x)

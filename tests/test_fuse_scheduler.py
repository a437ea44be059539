"""A fused scheduler runs as diffusers' own does: every output of every step, with every option that it has.

In float64 throughout both are one algorithm, to 1e-9. As diffusers ships it works its coefficients out in float32
(differences of logarithms, of which multistep solvers take quotients) and diffkern in float64, from the same float32
sigmas: then they agree to 2e-5, or to the rounding of diffusers itself where that is larger.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers.utils import torch_utils
from sampling import diffusers_in_float64
from torch import Tensor

from diffkern.integrations.diffusers import FUSED, fuse_scheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, in diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers: algorithm_type dpmsolver
    pytest.mark.filterwarnings("error:.*steps as in diffusers"),  # which would compare diffusers with itself
]
Config = dict[str, Any]
SHAPE = (2, 3, 4, 4)
STEPS = 8
SPACINGS: list[Config] = [{"timestep_spacing": s} for s in ("leading", "trailing", "linspace")]
EPSILON, X0, V, FLOW = ({"prediction_type": f"{p}"} for p in ("epsilon", "sample", "v_prediction", "flow_prediction"))
ZERO_SNR: Config = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KARRAS, EXPONENTIAL, LU = ({f"use_{n}": True} for n in ("karras_sigmas", "exponential_sigmas", "lu_lambdas"))
SIGMA_MIN: Config = {"final_sigmas_type": "sigma_min"}
FLOW_SIGMAS: Config = {**FLOW, "use_flow_sigmas": True, "flow_shift": 3.0}
RAMPS: list[Config] = [{**V, **ramp} for ramp in (KARRAS, EXPONENTIAL)]
CLIPS: list[Config] = [{"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.5}]
COSINE: Config = {"beta_schedule": "squaredcos_cap_v2"}
LOWER: Config = {"lower_order_final": True}
UNIPC: list[Config] = [{"predict_x0": d, "solver_type": b} for d, b in product((True, False), ("bh1", "bh2"))]
SDE: Config = {"algorithm_type": "sde-dpmsolver++"}


def model(x: Tensor, t: Any) -> Tensor:
    """A smooth nonlinear function of x and of the timestep."""
    t = float(t)
    return 0.6 * torch.tanh(x + t / 900) + 0.3 * torch.cos(2 * x - t / 200) - t / 10000


def start(scheduler: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)


def run(scheduler: Any, x: Tensor, timesteps: Any = None, **step: Any) -> list[tuple[Tensor, ...]]:
    """All that the steps of a run return, on the noise of one seeded generator."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        step["generator"] = torch.Generator().manual_seed(7)
    results = []
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        result = scheduler.step(model(x_in, t).to(x.dtype), t, x, return_dict=False, **step)
        results.append(result)
        x = result[0]
    return results


def delta(ours: list[tuple[Tensor, ...]], theirs: list[tuple[Tensor, ...]]) -> float:
    """The largest difference of any output of any step, relative to that step's scale where it is above 1."""
    assert [len(r) for r in ours] == [len(r) for r in theirs]
    pairs = [(a.double(), b.double()) for o, t in zip(ours, theirs, strict=True) for a, b in zip(o, t, strict=True)]
    assert all(torch.isfinite(b).all() for _, b in pairs)
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)


def plain(name: str, steps: int | None = STEPS, **config: Any) -> Any:
    """diffusers' own scheduler."""
    if name == "DPMSolverSinglestepScheduler":
        config = {"lower_order_final": True, **config}  # else diffusers turns it on while it steps, and says so
    scheduler = getattr(diffusers, name)(**config)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


class Case:
    """A diffusers scheduler, its config, and what its `step` is given."""

    def __init__(self, name: str, config: Config | None = None, **step: Any) -> None:
        self.name, self.config, self.step = f"{name}Scheduler", config or {}, step

    def __repr__(self) -> str:
        return "-".join(
            [self.name.removesuffix("Scheduler"), *(f"{k}={v}" for k, v in {**self.config, **self.step}.items())]
        )

    def plain(self) -> Any:
        return getattr(diffusers, self.name)(**self.config)


def orders(name: str, *configs: Config, upto: int = 3) -> list[Case]:
    return [Case(name, {**c, "solver_order": k}) for c in configs for k in range(1, upto + 1)]


MIDPOINT_HEUN: tuple[Config, ...] = ({"solver_type": "midpoint"}, {"solver_type": "heun"})
ALGORITHMS: list[Config] = [{"algorithm_type": a, **SIGMA_MIN} for a in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")]
SDE_OF_NOISE: Config = {"algorithm_type": "sde-dpmsolver", **SIGMA_MIN}

CASES: list[Case] = [
    *(Case("DDPM", {**p, **s}) for p, s in product((EPSILON, X0, V), SPACINGS)),
    *(Case("DDPM", c) for c in (*CLIPS, ZERO_SNR, COSINE, {"beta_schedule": "sigmoid"}, {"steps_offset": 1})),
    *(Case("DDPM", {"variance_type": v, **SPACINGS[1]}) for v in ("fixed_small_log", "fixed_large")),
    *(Case("DDIM", {**p, **s}) for p, s in product((EPSILON, X0, V), SPACINGS)),
    *(Case("DDIM", c, eta=0.5) for c in (*CLIPS, ZERO_SNR, {**V, "set_alpha_to_one": False})),
    *(Case("DDIM", c, eta=1.0, use_clipped_model_output=True) for c in (CLIPS[1], X0, V)),
    *(Case("PNDM", {**p, **s, "skip_prk_steps": k}) for p, s, k in product((EPSILON, V), SPACINGS, (True, False))),
    Case("PNDM", {"set_alpha_to_one": True, "steps_offset": 1, "skip_prk_steps": True}),
    *(Case("LCM", c) for c in (EPSILON, X0, V, *CLIPS, {"timestep_scaling": 3.0})),
    Case("LCM", {**V, "rescale_betas_zero_snr": True}),
    *(Case("EulerDiscrete", {**p, **s}) for p, s in product((EPSILON, X0, V), SPACINGS)),
    *(Case("EulerDiscrete", c) for c in (*RAMPS, ZERO_SNR, SIGMA_MIN, COSINE, {"interpolation_type": "log_linear"})),
    Case("EulerDiscrete", {**V, **KARRAS, "timestep_type": "continuous", "sigma_max": 200.0, "sigma_min": 0.01}),
    Case("EulerDiscrete", {"prediction_type": "original_sample"}),
    *(Case("EulerDiscrete", c, s_churn=4.0, s_noise=1.01) for c in (EPSILON, X0, V)),
    *(Case("EulerAncestralDiscrete", {**p, **s}) for p, s in product((EPSILON, V), SPACINGS)),
    Case("EulerAncestralDiscrete", ZERO_SNR),
    *(Case("HeunDiscrete", {**p, **s}) for p, s in product((EPSILON, X0, V), SPACINGS)),
    *(Case("HeunDiscrete", c) for c in (*RAMPS, *CLIPS, COSINE)),
    *(Case("EDMEuler", c) for c in ({}, V, SIGMA_MIN, {"sigma_schedule": "exponential", "sigma_data": 1.0})),
    Case("EDMEuler", s_churn=4.0, s_tmin=0.05, s_tmax=50.0),
    *orders("EDMDPMSolverMultistep", {}, V, MIDPOINT_HEUN[1]),
    # Its last step to sigma_min has no length, and diffusers' third order divides by that.
    *orders("EDMDPMSolverMultistep", SIGMA_MIN, *({**SDE, **s} for s in MIDPOINT_HEUN), upto=2),
    *(Case("DPMSolverMultistep", {**p, **s}) for p, s in product((EPSILON, X0, V), SPACINGS)),
    *orders("DPMSolverMultistep", *({**a, **s} for a, s in product(ALGORITHMS, MIDPOINT_HEUN))),
    *orders("DPMSolverMultistep", *({**SDE_OF_NOISE, **s} for s in MIDPOINT_HEUN), upto=2),
    *orders("DPMSolverMultistep", *RAMPS, {**V, **LU}, ZERO_SNR, FLOW_SIGMAS),
    *orders("DPMSolverMultistep", {"lower_order_final": False}, {"euler_at_final": True, **SIGMA_MIN}),
    *orders("DPMSolverMultistep", {"lambda_min_clipped": -5.1, **COSINE}),
    *(Case("DPMSolverMultistep", {**p, **a}) for p, a in product((X0, V), (ALGORITHMS[0], SDE_OF_NOISE))),
    *orders("DPMSolverSinglestep", *({**a, **s, **LOWER} for a, s in product(ALGORITHMS, MIDPOINT_HEUN))),
    *orders("DPMSolverSinglestep", X0, V, {**V, **KARRAS}, FLOW_SIGMAS),
    *orders("DEISMultistep", EPSILON, X0, V, *RAMPS, COSINE, {"lower_order_final": False}, FLOW_SIGMAS),
    *orders("UniPCMultistep", *({**p, **d, **SIGMA_MIN} for p, d in product((EPSILON, X0, V), UNIPC))),
    *orders("UniPCMultistep", *SPACINGS, *RAMPS, ZERO_SNR, FLOW_SIGMAS, {"disable_corrector": [0, 2]}),
    *(Case("FlowMatchEulerDiscrete", c) for c in ({}, {"shift": 3.0}, {"shift_terminal": 0.1}, KARRAS, EXPONENTIAL)),
    *(Case("FlowMatchEulerDiscrete", {name: True}) for name in ("invert_sigmas", "stochastic_sampling")),
]


@contextmanager
def float64(name: str) -> Iterator[None]:
    """Inside, diffusers computes in float64 what it computes in float32, on the same noise."""

    def randn_tensor(shape: Any, generator: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(dtype)

    module = importlib.import_module(getattr(diffusers, name).__module__)
    with diffusers_in_float64(module, randn_tensor), patch.object(torch_utils, "randn_tensor", randn_tensor):
        yield


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_equals_diffusers(case: Case, steps: int) -> None:
    plain = case.plain()
    plain.set_timesteps(steps)
    fused, x = fuse_scheduler(plain), start(plain)
    with torch.set_grad_enabled(steps == 7):  # without it a step calls the op's kernel itself
        ours = run(fused, x, **case.step)
    theirs = run(plain, x, **case.step)
    with float64(case.name):
        plain = case.plain()
        plain.set_timesteps(steps)
        fused, x = fuse_scheduler(plain), start(plain, torch.float64)
        exact = run(plain, x, **case.step)
        assert delta(run(fused, x, **case.step), exact) <= 1e-9
    assert delta(ours, theirs) <= 2e-5 + 2 * delta(theirs, exact)


def test_every_scheduler_is_compared() -> None:
    assert {c.name for c in CASES} == set(FUSED)

"""Every sampler against the diffusers scheduler of the same name and settings: all states of a run, not only the last.

The bound is far below the 1e-6 that is asked for, because `run_diffusers` lets diffusers compute in float64; as it
ships, its sigmas are float32, and then 2e-5 holds (`test_float32_diffusers`).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import diffusers
import pytest
from sampling import max_delta, run_diffusers, run_table, toy_model

from diffkern.samplers import SAMPLERS, Table, make_table
from diffkern.scheduler_config import from_diffusers_config

SPACINGS = ("leading", "trailing", "linspace")
EPSILON, X0, V = ({"prediction_type": p} for p in ("epsilon", "sample", "v_prediction"))


class Case:
    """A diffusers scheduler and its config, the sampler of ours and its options, and those of diffusers' step()."""

    def __init__(self, scheduler: str, sampler: str, config: Any = None, options: Any = None, step: Any = None) -> None:
        self.scheduler, self.sampler, self.config = f"{scheduler}Scheduler", sampler, config or {}
        self.options, self.step = options or {}, step or {}

    def __repr__(self) -> str:
        settings = [*self.config.items(), *self.options.items()]
        return "-".join([self.sampler, *(f"{k}={v}" for k, v in settings)]).replace("_type", "")

    def table(self, steps: int) -> Table:
        schedule = from_diffusers_config({"_class_name": self.scheduler, **self.config})
        return make_table(self.sampler, schedule, steps, **self.options)

    def delta(self, steps: int, wide: bool = True) -> float:
        ours = run_table(self.table(steps), toy_model)
        theirs = run_diffusers(self.scheduler, self.config, steps, ours[0], toy_model, wide=wide, **self.step)
        return max_delta(ours, theirs)


def spaced(*predictions: dict[str, str], spacings: tuple[str, ...] = SPACINGS) -> list[dict[str, Any]]:
    return [{**p, "timestep_spacing": s} for p, s in product(predictions, spacings)]


def beta_schedules() -> list[dict[str, Any]]:
    """What every beta schedule has to do with a sampler is its alphas: once for each is enough."""
    return [{"beta_schedule": s, **V} for s in ("scaled_linear", "squaredcos_cap_v2")]


ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
NO_CLIP, CLIP_HALF = {"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.5}

CASES = [
    *(Case("DDPM", "ddpm", c) for c in spaced(EPSILON, X0, V)),
    *(Case("DDPM", "ddpm", c) for c in (NO_CLIP, CLIP_HALF, ZERO_SNR, {"beta_schedule": "sigmoid"}, *beta_schedules())),
    # Not with trailing spacing: there diffusers adds noise of beta_t to the final sample, and the paper none.
    *(
        Case("DDPM", "ddpm", {"variance_type": "fixed_large", **c}, {"variance": "fixed_large"})
        for c in spaced(EPSILON, V, spacings=("leading", "linspace"))
    ),
    # Not linspace: diffusers' DDIM steps by T // steps whatever the spacing, to a timestep off the grid.
    *(Case("DDIM", "ddim", c) for c in spaced(EPSILON, X0, V, spacings=("leading", "trailing"))),
    *(
        Case("DDIM", "ddim", c, o, o)
        for o in ({"eta": 0.5}, {"eta": 1.0}, {"eta": 0.3, "use_clipped_model_output": True})
        for c in ({**EPSILON, **CLIP_HALF}, {**V, **NO_CLIP}, {**X0, "timestep_spacing": "trailing"}, ZERO_SNR)
    ),
    Case("DDIM", "ddim", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, {"final": "sigma_min"}),
    *(Case("EulerDiscrete", "euler", c) for c in (*spaced(EPSILON, X0, V), *beta_schedules(), ZERO_SNR)),
    *(Case("EulerDiscrete", "euler", {**c, **V}) for c in (KARRAS, EXPONENTIAL)),
    Case("EulerDiscrete", "euler", {"final_sigmas_type": "sigma_min"}, {"final": "sigma_min"}),
    *(Case("EulerAncestralDiscrete", "euler_a", c) for c in (*spaced(EPSILON, V), *beta_schedules(), ZERO_SNR)),
    *(Case("HeunDiscrete", "heun", c) for c in (*spaced(EPSILON, X0, V), *beta_schedules(), CLIP_HALF)),
    *(Case("HeunDiscrete", "heun", {**c, **V}) for c in (KARRAS, EXPONENTIAL)),
    *(
        Case("DPMSolverMultistep", sampler, {**c, **kind}, o)
        for sampler, kind in (
            ("dpmpp_2m", {}),
            ("dpmpp_3m", {"solver_order": 3}),
            ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
        )
        for c, o in [
            *((c, {}) for c in (*spaced(EPSILON, X0, V), *beta_schedules(), ZERO_SNR)),
            *(({**c, **V}, {}) for c in (KARRAS, EXPONENTIAL)),
            ({"solver_type": "heun"}, {"solver_type": "heun"}),
            ({"final_sigmas_type": "sigma_min"}, {"final": "sigma_min"}),
            ({"lower_order_final": False}, {"lower_order_final": False}),
            ({"steps_offset": 1, "timestep_spacing": "leading"}, {}),
        ]
    ),
    *(Case("UniPCMultistep", "unipc", c) for c in (*spaced(EPSILON, X0, V), *beta_schedules(), ZERO_SNR)),
    *(
        Case("UniPCMultistep", "unipc", {"solver_order": p, "solver_type": b, **V}, {"order": p, "solver_type": b})
        for p, b in product((1, 2, 3), ("bh1", "bh2"))
    ),
    *(Case("UniPCMultistep", "unipc", {**c, **V, "solver_order": 3}, {"order": 3}) for c in (KARRAS, EXPONENTIAL)),
    *(
        Case("UniPCMultistep", "unipc", {**flow, "prediction_type": "flow_prediction", "use_flow_sigmas": True})
        for flow in ({}, {"flow_shift": 3.0})
    ),
    Case("UniPCMultistep", "unipc", {"disable_corrector": [0, 2]}, {"disable_corrector": (0, 2)}),
    Case("UniPCMultistep", "unipc", {"final_sigmas_type": "sigma_min"}, {"final": "sigma_min"}),
    *(Case("DEISMultistep", "deis", c) for c in (*spaced(EPSILON, X0, V), *beta_schedules())),
    *(Case("DEISMultistep", "deis", {"solver_order": p, **V}, {"order": p}) for p in (1, 3)),
    *(Case("DEISMultistep", "deis", {**c, **V, "solver_order": 3}, {"order": 3}) for c in (KARRAS, EXPONENTIAL)),
    Case("DEISMultistep", "deis", {"lower_order_final": False}, {"lower_order_final": False}),
    # diffusers' PNDM takes epsilon and v, and like its DDIM steps by T // steps.
    *(
        Case("PNDM", "plms", {"skip_prk_steps": True, **c})
        for c in (*spaced(EPSILON, spacings=("leading", "trailing")), {"steps_offset": 1})
    ),
    *(
        Case("PNDM", "plms", {"skip_prk_steps": True, **c}, {"average": "output"})
        for c in (*spaced(V, spacings=("leading", "trailing")), *beta_schedules())
    ),
    Case("PNDM", "plms", {"skip_prk_steps": True, "set_alpha_to_one": True}, {"final": "zero"}),
    *(Case("LCM", "lcm", c) for c in (EPSILON, X0, V, CLIP_HALF, {"rescale_betas_zero_snr": True, **V})),
    Case("LCM", "lcm", {"timestep_scaling": 3.0, "original_inference_steps": 100},
         {"timestep_scaling": 3.0, "original_steps": 100}),
    *(Case("EDMEuler", "euler", c) for c in ({}, {"sigma_max": 20.0, "rho": 5.0, "sigma_data": 1.0})),
    *(Case("EDMDPMSolverMultistep", "dpmpp_2m", c) for c in ({}, {"sigma_min": 0.01, "sigma_data": 1.0})),
    Case("EDMDPMSolverMultistep", "dpmpp_3m", {"solver_order": 3}),
    *(Case("FlowMatchEulerDiscrete", "flow_euler", c) for c in ({}, {"shift": 3.0}, KARRAS, EXPONENTIAL)),
]  # fmt: skip


FIRST = {c.sampler: c for c in reversed(CASES)}
FIRST_OF_TYPE = {(c.sampler, c.config.get("prediction_type")): c for c in reversed(CASES)}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers


def runs() -> list[tuple[Case, int]]:
    """20 steps of everything; 5, where the last steps differ, of every option; 50 of every prediction type."""
    own = [c for c in CASES if c.options or c in FIRST_OF_TYPE.values()]
    return [*product(CASES, [20]), *product(own, [5]), *product(FIRST_OF_TYPE.values(), [50])]


@pytest.mark.parametrize(("case", "steps"), runs(), ids=repr)
def test_equals_diffusers(case: Case, steps: int):
    # diffusers' DDPM adds noise of variance 1e-20 where there is none, and with eta = 1 and a zero-SNR schedule DDIM
    # takes the square root of a difference that is zero up to rounding; everything else agrees to 1e-10.
    assert case.delta(steps) <= (1e-7 if case.sampler in ("ddpm", "ddim") else 1e-10)


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("case", FIRST.values(), ids=repr)
def test_float32_diffusers(case: Case, steps: int):
    """As diffusers ships, with float32 alphas and sigmas, and float32 states in some schedulers."""
    assert case.delta(steps, wide=False) <= 2e-5


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if "EDM" not in c.scheduler and (c.sampler in ("euler", "euler_a", "heun") or c in FIRST.values())
    ],
    ids=repr,
)
def test_initial_scale(case: Case):
    """Not for EDM: its initial noise has scale sigma_max in the paper, and hypot(sigma_max, 1) in diffusers."""
    scheduler = getattr(diffusers, case.scheduler)(**case.config)
    scheduler.set_timesteps(10)
    expected = float(getattr(scheduler, "init_noise_sigma", 1.0))  # float32
    assert case.table(10).init_scale == pytest.approx(expected, rel=1e-5)


def test_every_sampler_is_compared():
    by_paper = {"edm", "annealed_langevin", "predictor_corrector"}  # which are compared with their papers instead
    assert {c.sampler for c in CASES} == set(SAMPLERS) - by_paper

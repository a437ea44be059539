"""What is refused with a sentence, and what a fused scheduler leaves to diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from test_fuse_scheduler import STEPS, delta, plain, run, start
from torch import Tensor

from diffkern.integrations.diffusers import fuse_scheduler, fused_class

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, in diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers: algorithm_type dpmsolver
]


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("DDPM", {"thresholding": True}, "thresholding must be False: dynamic thresholding is no linear combination"),
        ("DDPM", {"variance_type": "learned_range"}, "variance_type must be fixed_small, .* not 'learned_range'"),
        (
            "DDIM",
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr needs prediction_type sample or v_prediction",
        ),
        ("PNDM", {"prediction_type": "sample"}, "prediction_type must be epsilon or v_prediction, not 'sample'"),
        ("EulerAncestralDiscrete", {"prediction_type": "sample"}, "must be epsilon or v_prediction, not 'sample'"),
        ("EDMEuler", {"prediction_type": "sample"}, "must be epsilon or v_prediction, not 'sample'"),
        ("DPMSolverMultistep", {"solver_order": 4}, "solver_order must be 1, 2 or 3, not 4"),
        ("DPMSolverMultistep", {"variance_type": "learned"}, "variance_type must be None or fixed, not 'learned'"),
        ("UniPCMultistep", {"prediction_type": "flow_prediction"}, "flow_prediction needs use_flow_sigmas=True"),
        ("UniPCMultistep", {"solver_p": diffusers.DDIMScheduler()}, "solver_p must be None"),
        ("UniPCMultistep", {"predict_x0": False}, "predict_x0=False needs final_sigmas_type sigma_min"),
        (
            "DPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
            "sde-dpmsolver needs solver_order 1 or 2",
        ),
        (
            "EDMDPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            r"sde-dpmsolver\+\+ needs solver_order 1 or 2",
        ),
    ],
)
def test_what_is_no_table_is_refused(name: str, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}Scheduler cannot be fused: .*{sentence}"):
        fuse_scheduler(plain(f"{name}Scheduler", None, **config))


class Stepper(diffusers.DDIMScheduler):
    """A user's own scheduler, which may step otherwise."""


@pytest.mark.parametrize("scheduler", [diffusers.IPNDMScheduler(), Stepper(), torch.nn.Identity()])
def test_other_schedulers_are_refused(scheduler: Any) -> None:
    name = type(scheduler).__name__
    with pytest.raises(ValueError, match=f"^{name} cannot be fused: it must be one of DDPMScheduler, DDIMScheduler"):
        fuse_scheduler(scheduler)
    with pytest.raises(ValueError, match="no noise is named 'white': choose one of diffusers, counter"):
        fuse_scheduler(diffusers.DDIMScheduler(), noise="white")


def test_a_class_made_with_the_wrong_prediction_steps_as_in_diffusers() -> None:
    made = fused_class(diffusers.PNDMScheduler)(prediction_type="sample")
    assert made.why_not(made) == "prediction_type must be epsilon or v_prediction, not 'sample'"


def test_an_instance_that_is_no_table_steps_as_in_diffusers() -> None:
    config: dict[str, Any] = {"thresholding": True, "sample_max_value": 2.0}
    made = fused_class(diffusers.UniPCMultistepScheduler)(**config)
    made.set_timesteps(STEPS)
    scheduler = plain("UniPCMultistepScheduler", **config)
    with pytest.warns(UserWarning, match="UniPCMultistepScheduler steps as in diffusers: thresholding must be False"):
        ours = run(made, start(made))
    assert delta(ours, run(scheduler, start(scheduler))) == 0


def test_irregular_calls_are_diffusers_own() -> None:
    x = start(plain("EulerDiscreteScheduler"))
    euler, flow = (fuse_scheduler(plain(n)) for n in ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"))
    for scheduler in (euler, flow):
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
        fuse_scheduler(diffusers.DDIMScheduler()).step(x, 3, x)
    tokens = torch.linspace(900, 100, 6).reshape(2, 3)
    x, m = torch.randn(2, 2, 3, 5)
    theirs = plain("FlowMatchEulerDiscreteScheduler").step(m, flow.timesteps[0], x, per_token_timesteps=tokens)
    ours = flow.step(m, flow.timesteps[0], x, per_token_timesteps=tokens)
    assert torch.equal(ours.prev_sample, theirs.prev_sample)


def test_wrong_arguments_get_a_sentence() -> None:
    ddim = fuse_scheduler(plain("DDIMScheduler"))
    with pytest.raises(ValueError, match=r"model_output must have the shape of sample, \[2, 3, 4\], not \[2, 6, 4\]"):
        ddim.step(torch.ones(2, 6, 4), ddim.timesteps[0], torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="unexpected keyword argument 'seed'"):
        ddim.step(torch.ones(2, 3, 4), ddim.timesteps[0], torch.ones(2, 3, 4), seed=1)
    euler = fuse_scheduler(plain("EulerDiscreteScheduler"), noise="counter")
    euler.scale_model_input(torch.ones(2, 3), euler.timesteps[0])
    with pytest.raises(ValueError, match="s_churn must be 0 with counter noise"):
        euler.step(torch.ones(2, 3), euler.timesteps[0], torch.ones(2, 3), s_churn=1.0)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("DPMSolverMultistepScheduler", 1000), ("HeunDiscreteScheduler", 4)],  # float32 gives neighbours one noise level
)
def test_a_step_without_finite_coefficients_is_diffusers_own(name: str, steps: int) -> None:
    scheduler = plain(name, steps, **({} if "Heun" in name else {"lower_order_final": False}))
    fused, x = fuse_scheduler(scheduler), start(scheduler)
    times = torch.cat([scheduler.timesteps, scheduler.timesteps[-1:]])  # on from the noise level of 0
    for s in (scheduler, fused):
        s.scale_model_input(x, times[0])

    def last(s: Any) -> Tensor:
        y = x
        for t in times if "Heun" in name else times[:-1]:
            y = s.step(0.1 * x, t, y).prev_sample
        return y

    with pytest.warns(UserWarning, match=f"{name} steps as in diffusers: a step needs noise levels that differ"):
        ours = last(fused)
    assert not ours.isfinite().any()
    assert not last(scheduler).isfinite().any()

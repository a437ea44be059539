"""The class of a fused scheduler is used as diffusers' own are, the way their tests do: made from a config, stepped at
timesteps off its grid, with a past that was set by hand, before any timesteps were set."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from test_fuse_scheduler import delta, float64, model
from torch import Tensor

from diffkern.integrations.diffusers import FUSED, fused_class

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, in diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers: attributes that are in the config
]
BOUND = 2e-5  # as in test_fuse_scheduler.py
every = pytest.mark.parametrize("name", FUSED)
SAMPLE = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
RESIDUAL = 0.1 * SAMPLE
PAST = [RESIDUAL + 0.2, RESIDUAL + 0.15, RESIDUAL + 0.1, RESIDUAL + 0.05]
UNSET = [n for n in FUSED if n in ("DDPMScheduler", "HeunDiscreteScheduler") or "Euler" in n]


def both(name: str, **config: Any) -> tuple[Any, Any]:
    """A fused scheduler and diffusers' own, made from one config."""
    if name == "DPMSolverSinglestepScheduler":
        config = {"lower_order_final": True, **config}  # else diffusers turns it on while it steps, and says so
    plain = getattr(diffusers, name)
    return fused_class(plain)(**config), plain(**config)


def steps(scheduler: Any, timesteps: Any, x: Tensor = SAMPLE) -> list[tuple[Tensor, ...]]:
    if "generator" in inspect.signature(scheduler.step).parameters:
        options = {"generator": torch.Generator().manual_seed(0)}
    else:
        options = {}
    results = []
    for t in timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        results.append(scheduler.step(RESIDUAL.to(x.dtype), t, x, return_dict=False, **options))
        x = results[-1][0]
    return results


@pytest.mark.parametrize("name", UNSET)
def test_before_timesteps_are_set(name: str) -> None:
    """All training timesteps are visited then, so near to each other that float32 cannot tell their betas well."""
    with float64(name):
        fused, plain = both(name)
        at = [t.item() if name == "DDPMScheduler" else t for t in plain.timesteps[[3, 4]]]
        assert delta(steps(fused, at, SAMPLE.double()), steps(plain, at, SAMPLE.double())) <= 1e-9


def test_neighbouring_timesteps_have_diffusers_betas() -> None:
    """Of them float32 knows a thousandth at best, and the noise is as large as they are."""
    fused, plain = both("DDPMScheduler")
    at = [t.item() for t in plain.timesteps[-4:]]
    assert delta(steps(fused, at), steps(plain, at)) <= 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_at_timesteps_off_the_grid(name: str) -> None:  # fmt: skip
    with float64(name):
        fused, plain = both(name)
        for scheduler in (fused, plain):
            if name != "DDPMScheduler":  # which asks that they are of the grid
                scheduler.set_timesteps(50)
        at = [0] if hasattr(plain, "set_begin_index") else [0, 1]  # the former take it for their last timestep
        assert delta(steps(fused, at, SAMPLE.double()), steps(plain, at, SAMPLE.double())) <= 1e-9


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "name", [n for n in FUSED if "solver_order" in inspect.signature(getattr(diffusers, n)).parameters]
)
def test_with_a_past_that_was_set(name: str, order: int) -> None:
    fused, plain = both(name, solver_order=order)
    for scheduler in (fused, plain):
        scheduler.set_timesteps(25)
        scheduler.model_outputs = PAST[:order]
    at = plain.timesteps[: order + 1]
    assert delta(steps(fused, at), steps(plain, at)) <= BOUND


@pytest.mark.parametrize("skip", [True, False])
def test_pndm_with_a_past_that_was_set(skip: bool) -> None:
    fused, plain = both("PNDMScheduler", skip_prk_steps=skip)
    for scheduler in (fused, plain):
        scheduler.set_timesteps(50)
        scheduler.ets = PAST[:]
    at = plain.timesteps[:9]
    assert delta(steps(fused, at), steps(plain, at)) <= BOUND
    by_hand = []
    for scheduler in (fused, plain):
        scheduler.counter = 0
        stages = [scheduler.step_plms] if skip else [scheduler.step_prk, scheduler.step_plms]
        by_hand.append([stage(RESIDUAL, 5, SAMPLE, return_dict=False) for stage in stages])
    assert delta(*by_hand) <= BOUND


@every
def test_trained_betas(name: str, tmp_path: Any) -> None:
    if "trained_betas" not in inspect.signature(getattr(diffusers, name)).parameters:
        pytest.skip("takes no betas")
    betas = np.linspace(0.01, 0.3, 20)
    fused, plain = both(
        name, trained_betas=betas, num_train_timesteps=20, **({"original_inference_steps": 10} if "LCM" in name else {})
    )
    fused.save_pretrained(tmp_path)
    loaded = type(fused).from_pretrained(tmp_path)
    assert loaded.betas.tolist() == plain.betas.tolist()
    for scheduler in (loaded, plain):
        scheduler.set_timesteps(5)
    assert delta(steps(loaded, plain.timesteps), steps(plain, plain.timesteps)) <= BOUND


@every
def test_compatible_schedulers_are_made_from_it_and_it_from_them(name: str) -> None:
    fused, _ = both(name)
    for other in fused.compatibles:
        if hasattr(other, "_backends"):  # stands for one that needs a library which is not here
            continue
        again = type(fused).from_config(other.from_config(fused.config).config)
        assert type(again) is type(fused)
        assert {k: v for k, v in again.config.items() if k in fused.config} == dict(fused.config)


@every
def test_attributes(name: str) -> None:
    fused, _ = both(name)
    fused.register_to_config(of_the_config=5)
    with pytest.warns(FutureWarning, match="of_the_config"):
        assert fused.of_the_config == 5
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'does_not_exist'"):
        _ = fused.does_not_exist


@every
def test_a_model_may_be_trained_through_a_step(name: str) -> None:
    gradients = []
    for scheduler in both(name):
        scheduler.set_timesteps(6)
        x = SAMPLE.clone().requires_grad_()
        t = scheduler.timesteps[2]
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        options = (
            {"generator": torch.Generator()} if "generator" in inspect.signature(scheduler.step).parameters else {}
        )
        scheduler.step(model(x_in, t), t, x, **options).prev_sample.square().sum().backward()
        assert x.grad is not None
        gradients.append((x.grad,))
    assert delta(gradients[:1], gradients[1:]) <= BOUND

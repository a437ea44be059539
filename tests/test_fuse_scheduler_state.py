"""A fused scheduler is the scheduler it was made from: class, config, files, copies, begin index, dtypes, outputs."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from sampling import KEYS, SHAPE, max_delta, run_table
from test_fuse_scheduler import FLOW_SIGMAS, STEPS, delta, model, plain, run, start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffkern import make_table
from diffkern.backend import BackendError, use_backend
from diffkern.integrations.diffusers import FUSED, fuse_scheduler, restore_scheduler
from diffkern.ops.randn import normal
from diffkern.scheduler_config import from_diffusers_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, in diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers: algorithm_type dpmsolver
]
BOUND = 2e-5  # as in test_fuse_scheduler.py
every = pytest.mark.parametrize("name", FUSED)


def halves(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The timesteps of a run before and after its middle, between two steps of Heun."""
    return scheduler.timesteps[:5], scheduler.timesteps[5:]


def taken_on(scheduler: Any, other: Any) -> list[tuple[Tensor, ...]]:
    """A run's first half by one scheduler, the second by what `other` makes of it then."""
    first, second = halves(scheduler)
    results = run(scheduler, start(scheduler), first)
    return results + run(other(scheduler), results[-1][0], second)


@every
def test_it_is_the_scheduler_that_it_was_made_from(name: str, tmp_path: Any) -> None:
    scheduler = plain(name)
    fused = fuse_scheduler(scheduler)
    assert isinstance(fused, type(scheduler))
    assert type(fused).__name__ == name
    assert type(fused).__module__ == type(scheduler).__module__
    assert fused.config == scheduler.config
    assert fused.order == scheduler.order
    assert torch.equal(fused.timesteps, scheduler.timesteps)
    assert inspect.signature(fused.step) == inspect.signature(scheduler.step)
    assert {c.__name__ for c in fused.compatibles} == {c.__name__ for c in scheduler.compatibles}
    assert hasattr(fused, "add_noise") == hasattr(scheduler, "add_noise")
    if hasattr(scheduler, "init_noise_sigma"):
        assert float(fused.init_noise_sigma) == float(scheduler.init_noise_sigma)
    for part, s in (("a", scheduler), ("b", fused)):
        s.save_pretrained(tmp_path / part)
    files = [(tmp_path / part / "scheduler_config.json").read_text() for part in ("a", "b")]
    assert files[0] == files[1]
    loaded = type(fused).from_pretrained(tmp_path / "b")
    assert type(loaded) is type(fused)
    assert type(type(scheduler).from_pretrained(tmp_path / "b")) is type(scheduler)
    assert dict(type(fused).from_config(scheduler.config).config) == dict(scheduler.config)


@every
@pytest.mark.parametrize(
    "other", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), restore_scheduler, fuse_scheduler]
)
def test_a_copy_takes_a_run_on(name: str, other: Any) -> None:
    scheduler = plain(name)
    whole = taken_on(scheduler, lambda s: s)
    assert delta(taken_on(fuse_scheduler(plain(name)), other), whole) <= BOUND
    assert delta(taken_on(plain(name), fuse_scheduler), whole) <= BOUND


def test_restored_is_diffusers_own_class() -> None:
    scheduler = plain("UniPCMultistepScheduler")
    restored = restore_scheduler(fuse_scheduler(scheduler, noise="counter"))
    assert type(restored) is type(scheduler)
    assert set(vars(restored)) == set(vars(scheduler))
    with pytest.raises(ValueError, match=r"UniPCMultistepScheduler is not fused: restore_scheduler takes what"):
        restore_scheduler(restored)


@every
def test_a_scheduler_is_left_as_it_was(name: str) -> None:
    scheduler = plain(name)
    before = copy.deepcopy(vars(scheduler))
    fused = fuse_scheduler(scheduler)
    run(fused, start(fused))
    assert repr(vars(scheduler)) == repr(before)


@every
def test_image_to_image(name: str) -> None:
    """From the middle of a run, with and without a begin index, as pipelines do."""
    for begin in (None, 4):
        results, noisy = [], []
        for scheduler in (plain(name), fuse_scheduler(plain(name))):
            if begin is not None and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            x, z = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
            times = scheduler.timesteps[4:]
            if hasattr(scheduler, "add_noise"):
                x = scheduler.add_noise(x, z, times[:1])
            else:
                x = scheduler.scale_noise(x, times[:1], z)
            noisy.append((x,))
            if name != "PNDMScheduler":  # which starts its averages anew, and needs a whole run of them
                results.append(run(scheduler, x, times))
        assert delta(noisy[:1], noisy[1:]) <= 1e-6
        if results:
            assert delta(results[1], results[0]) <= BOUND


@every
def test_noise_is_added_to_each_sample(name: str) -> None:
    scheduler = plain(name)
    fused = fuse_scheduler(scheduler)
    times = scheduler.timesteps[[6, 0, 3]]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, z = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        ours, theirs, exact = (
            s.add_noise(a, b, times) if hasattr(s, "add_noise") else s.scale_noise(a, times, b)
            for s, a, b in ((fused, x, z), (scheduler, x, z), (scheduler, x.double(), z.double()))
        )
        assert ours.dtype == theirs.dtype == dtype
        ulp = torch.finfo(dtype).eps * float(exact.abs().max())
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + max(ulp, 1e-6)


@pytest.mark.parametrize(
    ("name", "config", "given"),
    [
        ("DDPMScheduler", {}, {"timesteps": [900, 500, 20, 3]}),
        ("LCMScheduler", {}, {"timesteps": [999, 499, 39]}),
        ("HeunDiscreteScheduler", {}, {"timesteps": [900, 500, 20, 3]}),
        ("EulerDiscreteScheduler", {}, {"timesteps": [900, 500, 20, 3]}),
        ("EulerDiscreteScheduler", {}, {"sigmas": [14.6, 3.0, 0.4, 0.0]}),
        ("DPMSolverMultistepScheduler", {}, {"timesteps": [900, 500, 20, 3]}),
        ("DPMSolverSinglestepScheduler", {}, {"timesteps": [900, 500, 20, 3]}),
        ("EDMEulerScheduler", {}, {"sigmas": torch.tensor([0.0, 0.4, 0.7, 1.0])}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}, {"sigmas": [1.0, 0.6, 0.3]}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"num_inference_steps": 6, "mu": 0.7}),
        ("UniPCMultistepScheduler", FLOW_SIGMAS, {"sigmas": np.array([0.9, 0.6, 0.3])}),
    ],
)  # fmt: skip
def test_timesteps_and_sigmas_of_ones_own(name: str, config: dict[str, Any], given: dict[str, Any]) -> None:
    scheduler = plain(name, None, **config)
    fused = fuse_scheduler(scheduler)
    for steps in (given, {"num_inference_steps": 5, **({"mu": 0.5} if "mu" in given else {})}):  # then others
        for s in (scheduler, fused):
            s.set_timesteps(**copy.deepcopy(steps))
        x = start(scheduler)
        assert delta(run(fused, x), run(scheduler, x)) <= BOUND


@every
def test_other_timesteps_and_configs_make_other_rows(name: str) -> None:
    fused = fuse_scheduler(plain(name))
    run(fused, start(fused))
    for change in ({}, {"prediction_type": "v_prediction"} if "FlowMatch" not in name else {}):
        scheduler = plain(name, 6, **change)
        fused.register_to_config(**change)
        fused.set_timesteps(6)
        x = start(scheduler)
        assert delta(run(fused, x), run(scheduler, x)) <= BOUND


def test_a_second_run_takes_the_rows_of_the_first() -> None:
    fused, scheduler = fuse_scheduler(plain("DDIMScheduler")), plain("DDIMScheduler")
    x = start(fused)
    first, made = run(fused, x), fused.levels.made
    fused.set_timesteps(STEPS)
    assert delta(run(fused, x), first) == 0
    assert fused.levels.made is made
    for s in (fused, scheduler):
        s.num_inference_steps = 2 * STEPS  # half the way of a step
    assert delta(run(fused, x), run(scheduler, x)) <= BOUND
    assert delta(run(fused, x), first) > 0.01


@every
@pytest.mark.parametrize("noise", ["diffusers", "counter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_and_without_gradients_and_in_any_layout(name: str, noise: str, dtype: torch.dtype) -> None:
    """The op is called, or its kernel itself."""
    results = []
    for enabled in (True, False):
        for layout in (torch.contiguous_format, torch.channels_last):
            fused = fuse_scheduler(plain(name), noise=noise)
            with torch.set_grad_enabled(enabled):
                results.append(run(fused, start(fused, dtype).contiguous(memory_format=layout)))
    assert all(delta(results[0], r) == 0 for r in results[1:])


def test_a_forced_backend_is_forced_in_the_midst_of_a_run() -> None:
    fused = fuse_scheduler(plain("DDIMScheduler"))
    first, second = halves(fused)
    with torch.no_grad():
        x = run(fused, start(fused), first)[-1][0]
        with use_backend("cuda"), pytest.raises(BackendError, match="sampler_step: backend 'cuda' was forced but"):
            run(fused, x, second)
        with use_backend("reference"), patch.object(torch.ops.diffkern_C, "sampler_step", None):
            run(fused, x, second)


def test_in_inference_mode() -> None:
    """Its tensors count no versions."""
    with torch.inference_mode():
        scheduler = plain("EulerDiscreteScheduler")
        fused, x = fuse_scheduler(scheduler), start(scheduler)
        assert delta(run(fused, x), run(scheduler, x)) <= BOUND
        for s in (fused, scheduler):
            s.set_timesteps(5)
        assert delta(run(fused, x), run(scheduler, x)) <= BOUND


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The dtypes are diffusers', and the result no further from float32's than diffusers' own, but for one rounding."""
    config: dict[str, Any] = {"sigma_max": 20.0} if name.startswith("EDM") else {}
    x = start(plain(name, **config), dtype)
    ours, theirs, exact = (
        run(s, a) for s, a in (
            (fuse_scheduler(plain(name, **config)), x), (plain(name, **config), x), (plain(name, **config), x.float())
        )
    )  # fmt: skip
    assert [[t.dtype for t in r] for r in ours] == [[t.dtype for t in r] for r in theirs]
    assert delta(ours, exact) <= 1.5 * delta(theirs, exact) + torch.finfo(dtype).eps


@every
def test_outputs_have_diffusers_names(name: str) -> None:
    results = []
    for scheduler in (plain(name), fuse_scheduler(plain(name))):
        x, t = start(scheduler), scheduler.timesteps[0]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        results.append(scheduler.step(model(x, t), t, x))
    assert type(results[0]) is type(results[1])
    assert results[0].keys() == results[1].keys()
    assert torch.equal(results[1][0], results[1].prev_sample)


class CountReads(TorchDispatchMode):
    """Counts the numbers that the host reads, for which it would wait for a device."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@every
@pytest.mark.parametrize("noise", ["diffusers", "counter"])
def test_no_step_after_the_first_reads_a_tensor(name: str, noise: str) -> None:
    fused = fuse_scheduler(plain(name), noise=noise)
    x, reads = start(fused), []
    for t in fused.timesteps:
        x_in = fused.scale_model_input(x, t) if hasattr(fused, "scale_model_input") else x
        m = 0.1 * x_in
        with CountReads() as count:
            x = fused.step(m, t, x).prev_sample
        reads.append(count.reads)
    assert reads[1:] == [0] * (len(fused.timesteps) - 1)


@pytest.mark.parametrize(
    ("name", "config", "sampler", "options"),
    [
        ("DDPM", {}, "ddpm", {}),
        ("LCM", {}, "lcm", {}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", {}),
        ("EulerAncestralDiscrete", {}, "euler_a", {}),
    ],
)
def test_counter_noise_is_that_of_diffkerns_samplers(name: str, config: Any, sampler: str, options: Any) -> None:
    table = make_table(sampler, from_diffusers_config({"_class_name": f"{name}Scheduler", **config}), STEPS, **options)
    theirs = run_table(table, model)
    fused = fuse_scheduler(plain(f"{name}Scheduler", **config), noise="counter", seed=0)
    x = table.init_scale * normal(KEYS, SHAPE, 0, torch.float32)
    alone = run(copy.deepcopy(fused), x[:1])
    ours = [x, *(result[0] for result in run(fused, x))]
    assert max_delta([o.double() for o in ours], theirs) <= 2e-5
    assert all(torch.equal(a[0][0], o[0]) for a, o in zip(alone, ours[1:], strict=True))

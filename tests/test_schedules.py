"""The schedules against diffusers' and their papers' closed forms, and what a Schedule does with data."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkern.ops.randn import noise_keys, normal
from diffkern.scheduler_config import from_diffusers_config
from diffkern.schedules import (
    PREDICTIONS,
    SCHEDULES,
    Schedule,
    cosine,
    edm,
    flow,
    from_betas,
    linear,
    make_schedule,
    rescale_zero_snr,
)

F64 = torch.float64
KEYS = noise_keys(7, 3)
CONFIGS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"beta_schedule": "sigmoid", "prediction_type": "sample"},
    {"beta_schedule": "linear", "num_train_timesteps": 37, "prediction_type": "v_prediction"},
    {"trained_betas": [0.1, 0.2, 0.3, 0.5]},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_alphas_are_those_of_diffusers(config):
    ours = from_diffusers_config(config)
    scheduler: Any = diffusers.DDPMScheduler(**config)
    theirs = scheduler.alphas_cumprod.to(F64)  # float32, a running product of T factors
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours.alpha_t**2, theirs, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(ours.alpha_t**2 + ours.sigma_t**2, torch.ones(len(ours), dtype=F64))


@pytest.mark.parametrize("config", CONFIGS[:5], ids=str)
def test_noising_and_targets_are_those_of_diffusers(config):
    ours = from_diffusers_config(config)
    theirs: Any = diffusers.DDPMScheduler(**config)
    x0, t = torch.linspace(-1, 1, 3 * 8, dtype=torch.float32).reshape(3, 2, 4), torch.tensor([0, 20, len(ours) - 1])
    x_t, noise = ours.add_noise(x0, t, KEYS, return_noise=True)
    assert torch.equal(ours.add_noise(x0, t, KEYS), x_t)
    # In float32, diffusers' sigma_0 = sqrt(1 - alpha_bar_0) keeps about four digits.
    torch.testing.assert_close(x_t, theirs.add_noise(x0, noise, t), rtol=0, atol=2e-5)
    velocity = theirs.get_velocity(x0, noise, t)
    expected = {"epsilon": noise, "x0": x0, "v": velocity}[ours.prediction]
    torch.testing.assert_close(ours.target(x0, noise, t), expected, rtol=0, atol=2e-5)


def test_noise_is_of_its_draw():
    x0, t = torch.zeros(3, 5, dtype=F64), torch.zeros(3, dtype=torch.int64)
    noise = linear(10).add_noise(x0, t, KEYS, return_noise=True, draw=123)[1]
    assert torch.equal(noise, normal(KEYS, (5,), 123, F64))
    assert not torch.equal(linear(10).add_noise(x0, t, KEYS, return_noise=True)[1], noise)


def test_edm_levels_and_preconditioning():
    """Karras et al. 2022, eq. 5 and table 1."""
    s = edm(50, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    assert s.alpha_t.eq(1).all()
    assert s.sigma_t[[0, -1]].tolist() == pytest.approx([0.002, 80.0])
    i = 13
    level = (80 ** (1 / 7) + i / 49 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert s.sigma_t[49 - i].item() == pytest.approx(level)
    c_skip, c_out = s.x0_weights(1.0, 3.0)
    assert c_skip == pytest.approx(0.25 / 9.25)
    assert c_out == pytest.approx(3 * 0.5 / 9.25**0.5)
    assert s.c_in(3.0) == pytest.approx(9.25**-0.5)
    assert s.times[-1].item() == pytest.approx(math.log(80.0) / 4)
    # The target has unit variance at every level for data of variance sigma_data^2.
    u, w = PREDICTIONS["edm"](1.0, s.sigma_t, 0.5)
    torch.testing.assert_close(0.25 * u**2 + w**2, torch.ones(50, dtype=F64))


def test_flow_is_the_shifted_line():
    """Esser et al. 2024, eq. 23."""
    s = flow(1000, shift=3.0)
    theirs: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(s.sigma_t, theirs.sigmas.flip(0).to(F64), rtol=1e-6, atol=1e-7)
    assert s.sigma_t[499].item() == pytest.approx(3 * 0.5 / 2)
    torch.testing.assert_close(s.alpha_t, 1 - s.sigma_t)
    torch.testing.assert_close(s.times, 1000 * s.sigma_t)
    x0, noise = normal(KEYS, (4,), 0, F64), normal(KEYS, (4,), 1, F64)
    assert torch.equal(s.target(x0, noise, torch.tensor([1, 2, 3])), noise - x0)


def test_cosine_is_its_closed_form_where_no_beta_is_capped():
    """Nichol & Dhariwal 2021, eq. 17."""
    f = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 50)]
    assert cosine(100).alpha_t[49].item() ** 2 == pytest.approx(f[1] / f[0])
    assert cosine(100).alpha_t[-1] > 0


def test_zero_terminal_snr():
    """Lin et al. 2024, algorithm 1: the last alpha is 0, the first unchanged, the steps in proportion."""
    before, after = linear(100), rescale_zero_snr(linear(100))
    assert after.alpha_t[-1] == 0
    assert after.sigma_t[-1] == 1
    assert after.alpha_t[0].item() == pytest.approx(before.alpha_t[0].item())
    ratio = after.alpha_t.diff() / before.alpha_t.diff()
    torch.testing.assert_close(ratio, ratio[:1].expand(99))
    with pytest.raises(ValueError, match="path 'flow'"):
        rescale_zero_snr(flow(10))


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    prediction=st.sampled_from(["epsilon", "x0", "v", "flow"]),
    index=st.integers(0, 98),
)
@settings(max_examples=100, deadline=None)
def test_prediction_gives_back_x0_and_epsilon(name, prediction, index):
    """x0 = a x + b m and epsilon = c x + d m, for m the training target at the same level, in every schedule."""
    s = make_schedule(name, 100, **({} if name == "edm" else {"prediction": prediction}))
    x0, noise = normal(KEYS[:1], (4,), 0, F64), normal(KEYS[:1], (4,), 1, F64)
    alpha, sigma = s.alpha_t[index].item(), s.sigma_t[index].item()
    x, m = alpha * x0 + sigma * noise, s.target(x0, noise, torch.tensor([index]))
    (a, b), (c, d) = s.x0_weights(alpha, sigma), s.epsilon_weights(alpha, sigma)
    torch.testing.assert_close(a * x + b * m, x0, rtol=0, atol=1e-9 / alpha)
    torch.testing.assert_close(c * x + d * m, noise, rtol=0, atol=1e-9 / sigma)


def test_the_table_of_add_noise():
    s = linear(20)
    assert s.alpha_sigma.shape == (20, 2)
    assert s.alpha_sigma.dtype == torch.float32
    torch.testing.assert_close(s.alpha_sigma.to(F64), torch.stack([s.alpha_t, s.sigma_t], 1), rtol=1e-7, atol=0)
    torch.testing.assert_close(s.lambda_t, (s.alpha_t / s.sigma_t).log())


def test_config_options_are_read():
    s = from_diffusers_config({"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample_range": 2.0})
    assert (s.spacing, s.steps_offset, s.clip, s.prediction, s.path) == ("leading", 1, 2.0, "epsilon", "vp")
    s = from_diffusers_config({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0})
    assert (s.path, s.shift, s.clip) == ("flow", 3.0, math.inf)
    s = from_diffusers_config({"_class_name": "EDMEulerScheduler", "sigma_max": 10.0, "sigma_data": 1.0})
    assert (s.prediction, s.sigma_data, s.spacing, s.sigma_t[-1].item()) == ("edm", 1.0, "karras", pytest.approx(10))
    s = from_diffusers_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0})
    assert (s.prediction, s.shift, s.spacing) == ("flow", 2.0, "linspace")
    s = from_diffusers_config({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True})
    assert (s.spacing, s.clip) == ("karras", math.inf)


@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM", "PNDM", "LCM", "HeunDiscrete", "EulerDiscrete", "UniPCMultistep",
                                       "EulerAncestralDiscrete", "DPMSolverMultistep", "DEISMultistep", "EDMEuler",
                                       "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete"])  # fmt: skip
def test_every_default_config_is_read(scheduler, tmp_path):
    """As diffusers writes it, with every key."""
    theirs = getattr(diffusers, f"{scheduler}Scheduler")()
    theirs.save_config(tmp_path)
    config = theirs.load_config(tmp_path)
    ours = from_diffusers_config(config)
    short = from_diffusers_config({"_class_name": config["_class_name"]})  # our defaults are theirs
    assert torch.equal(ours.sigma_t, short.sigma_t)
    assert (ours.spacing, ours.clip, ours.prediction) == (short.spacing, short.clip, short.prediction)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "SomeScheduler"}, "no diffusers scheduler is named 'SomeScheduler'.*DDPMScheduler"),
        ({"beta_schedule": "quadratic"}, "no beta_schedule is named 'quadratic': choose one of linear, scaled_linear"),
        ({"prediction_type": "noise"}, "no prediction_type is named 'noise': choose one of epsilon, sample"),
        ({"timestep_spacing": "random"}, "no spacing is named 'random': choose one of linspace, leading"),
        ({"thresholding": True}, "thresholding=True is not supported.*must be False"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range' is not supported"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"beta_begin": 1e-3}, "no key of a scheduler config is named 'beta_begin'.*beta_start"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "choose one of epsilon"),
        ({"num_train_timesteps": 0}, "T >= 1"),
        ({"trained_betas": [0.1, 1.5]}, "betas must be"),
    ],
    ids=str,
)
def test_unknown_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "score"}, "no prediction is named 'score': choose one of epsilon, x0, v, flow, edm"),
        ({"path": "line"}, "no path is named 'line'"),
        ({"spacing": "even"}, "no spacing is named 'even'"),
        ({"prediction": "edm"}, "go together"),
        ({"clip": -1.0}, "clip must be > 0"),
        ({"clip": math.nan}, "clip must be > 0"),
        ({"alpha_t": torch.ones(3)}, "float64"),
        ({"alpha_t": torch.ones(4, dtype=F64)}, "one length"),
        ({"sigma_t": torch.zeros(3, dtype=F64)}, "sigma_t finite and > 0"),
        ({"sigma_t": torch.tensor([0.1, 0.3, 0.2], dtype=F64)}, "must fall with t"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_invalid_schedules_are_refused(change, message):
    good: dict[str, Any] = {"alpha_t": torch.ones(3, dtype=F64), "sigma_t": torch.tensor([0.1, 0.2, 0.3], dtype=F64)}
    Schedule(**good)
    with pytest.raises(ValueError, match=message):
        Schedule(**{**good, **change})


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="no schedule is named 'exp': choose one of linear"):
        make_schedule("exp")
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        edm(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="betas must be"):
        from_betas(torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_below_zero_or_past_the_end_is_refused(t):
    """A negative one was counted from the end."""
    s, x0, timestep = flow(1000), torch.zeros(3, 2), torch.tensor([0, t, 999])
    for call in (lambda: s.target(x0, x0, timestep), lambda: s.add_noise(x0, timestep, KEYS)):
        with pytest.raises(RuntimeError, match=rf"timestep\[1\] is {t}, allowed are 0 to 999$"):
            call()

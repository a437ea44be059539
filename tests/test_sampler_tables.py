"""Tables by themselves: EDM against its paper, identities between samplers, settings that are refused, properties."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import KEYS, max_delta, noise, run_table, toy_model
from torch import Tensor

from diffkern.ops.sampler_step import C_IN, CLIP, TIMESTEP
from diffkern.samplers import SAMPLERS, Row, Table, Weights, make_table, options
from diffkern.samplers.grid import grid
from diffkern.samplers.table import BASE, X0, X
from diffkern.schedules import Schedule, cosine, edm, flow, linear, rescale_zero_snr, scaled_linear

V = linear(1000, prediction="v")


def algorithm_2(steps: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Tensor:
    """Karras et al. 2022, algorithm 2, as it stands there, with the noise of KEYS."""
    ramp = [80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in range(steps)]
    t, draw = [*(r**7 for r in ramp), 0.0], 0

    def D(x: Tensor, sigma: float) -> Tensor:
        c = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5, 1 / (sigma**2 + 0.25) ** 0.5
        return c[0] * x + c[1] * toy_model(c[2] * x, math.log(sigma) / 4)

    x = t[0] * noise(0)
    for i in range(steps):
        gamma = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        if gamma > 0:
            if i > 0:
                x = x + (t_hat**2 - t[i] ** 2) ** 0.5 * s_noise * noise(draw := draw + 1)
            else:  # the table adds the first two noises up in its initial scale
                x = (t[0] ** 2 + (t_hat**2 - t[0] ** 2) * s_noise**2) ** 0.5 * noise(0)
        d = (x - D(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0:
            d_next = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    return x


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(
    "churn",
    [(0.0, 0.0, math.inf, 1.0), (40.0, 0.05, 50.0, 1.003), (3.0, 0.0, math.inf, 0.9), (100.0, 0.0, math.inf, 1.0)],
    ids=str,
)
def test_edm_is_algorithm_2(steps, churn):
    names = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), churn, strict=True))
    ours = run_table(make_table("edm", edm(1000), steps, **names), toy_model)[-1]
    assert (ours - algorithm_2(steps, *churn)).abs().max() < 1e-11


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
def test_ddim_with_eta_1_is_ddpm(prediction, spacing):
    """Song et al. 2021, section 4.1; also with the spacing of which diffusers' DDIM leaves the grid."""
    schedule = linear(1000, prediction=prediction, spacing=spacing)
    ddpm, ddim = make_table("ddpm", schedule, 7), make_table("ddim", schedule, 7, eta=1.0)
    assert max_delta(run_table(ddpm, toy_model), run_table(ddim, toy_model)) < 1e-10


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_first_orders_are_one_method(prediction):
    """DDIM, Euler in x / alpha, DEIS-1, UniP-1 and DPM-Solver++ of order 1 are the same steps."""
    schedule, at = scaled_linear(1000, prediction=prediction), [900, 600, 350, 100, 20]
    alpha = [*(schedule.alpha_t[at].tolist()), 1.0]
    euler = make_table("euler", schedule, 5, spacing=at)
    ddim = run_table(make_table("ddim", schedule, 5, spacing=at), toy_model)
    ours = run_table(Table(euler.rows, 1 / alpha[0]), toy_model)
    assert max_delta([a * x for a, x in zip(alpha, ours, strict=True)], ddim) < 1e-11
    for name, extra in (
        ("deis", {"order": 1, "final": "zero"}),
        ("unipc", {"order": 1, "disable_corrector": tuple(range(5))}),
    ):
        assert max_delta(run_table(make_table(name, schedule, 5, spacing=at, **extra), toy_model), ddim) < 1e-11


def test_higher_orders_of_a_linear_model_are_exact():
    """DPM-Solver++ integrates a polynomial in lambda exactly: with m = x_0 linear in it, one step of any size."""
    lam = torch.linspace(3.0, -3.0, 601, dtype=torch.float64)
    schedule = Schedule(torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt(), prediction="x0")
    ends = [600, 450, 300, 0]

    def line(x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, lam[int(t)].item())

    def exact(x: Tensor, s: float, t: float) -> Tensor:  # Lu et al. 2022, eq. 8
        alpha, sigma = (1 + math.exp(-2 * t)) ** -0.5, (1 + math.exp(2 * t)) ** -0.5
        sigma_s = (1 + math.exp(2 * s)) ** -0.5
        return sigma / sigma_s * x + alpha * ((t - 1) - (s - 1) * math.exp(s - t))

    for name, extra in (
        ("dpmpp_2m", {"solver_type": "heun", "lower_order_final": False}),
        ("dpmpp_3m", {"solver_type": "heun", "lower_order_final": False}),
        ("dpmpp_3m", {"solver_type": "heun", "lower_order_final": False, "third_order": True}),
    ):
        states = run_table(make_table(name, schedule, 3, spacing=ends[:-1], final="sigma_min", **extra), line)
        for i in (1, 2):  # the first step has no history, and is of order 1
            torch.testing.assert_close(states[i + 1], exact(states[i], lam[ends[i]].item(), lam[ends[i + 1]].item()))


def test_clip_bounds_x0_and_infinity_takes_it_off():
    clipped = linear(1000, clip=0.3)
    for name in ("ddpm", "ddim", "heun", "dpmpp_2m", "euler", "unipc", "deis", "euler_a", "annealed_langevin"):
        assert make_table(name, clipped, 4).data[:-1, CLIP].eq(0.3).all()
        assert make_table(name, clipped, 4, clip=math.inf).data[:-1, CLIP].isinf().all()
        assert make_table(name, clipped, 4, clip=0.7).data[:-1, CLIP].eq(0.7).all()
    assert make_table("plms", clipped, 4).data[:-1, CLIP].isinf().all()
    last = run_table(make_table("dpmpp_2m", clipped, 4), toy_model)[-1]
    assert last.abs().max() == pytest.approx(0.3)


def test_weights_are_linear():
    w = 2 * (X - 3 * X0) / 4 + BASE
    assert w == {"x": 0.5, "x0": -1.5, "base": 1.0}
    assert isinstance(w, Weights)


def test_draws_are_counted_by_noisy_rows():
    row = Row(0.0, (1.0, 0.0), X)
    noisy = Row(0.0, (1.0, 0.0), X, noise=0.5)
    table = Table([noisy, row, noisy, noisy])
    assert table.data[:-1, 6].tolist() == [1, 1, 2, 3]
    assert table.noisy
    assert not Table([row]).noisy


def test_what_a_table_reads():
    assert make_table("unipc", V, 6, order=3).history == 3
    assert make_table("unipc", V, 6).uses_base
    assert make_table("heun", V, 6).uses_base
    assert make_table("heun", V, 6).history == 0
    assert make_table("dpmpp_2m", V, 6).history == 1
    assert make_table("dpmpp_3m", V, 6).history == 2
    assert make_table("plms", V, 6).history == 3
    assert not make_table("ddim", V, 6).uses_base
    assert len(make_table("heun", V, 6)) == 11
    assert len(make_table("plms", V, 6)) == 7
    assert len(make_table("annealed_langevin", V, 6, langevin_steps=3)) == 19
    assert len(make_table("predictor_corrector", V, 6, langevin_steps=2)) == 16


@pytest.mark.parametrize(
    ("name", "schedule", "steps", "given", "message"),
    [
        ("dpm", V, 5, {}, "no sampler is named 'dpm': choose one of ddpm, ddim, euler"),
        ("ddim", V, 5, {"order": 2}, "ddim takes no option order: it takes eta, clip"),
        *((name, V, 0, {}, "at least 1|at least 2|1 <= steps") for name in sorted(set(SAMPLERS) - {"flow_euler"})),
        ("plms", V, 1, {}, "at least 2 steps"),
        ("ddpm", V, 1001, {}, "1001 steps are more than the schedule's 1000 timesteps"),
        ("dpmpp_2m", V, 1000, {"spacing": "linspace"}, "visit a noise level twice"),
        ("ddim", linear(10, steps_offset=1, spacing="leading"), 10, {}, "leave the range 0..9"),
        ("ddim", V, 5, {"eta": 1.5}, "eta must be between 0 and 1, not 1.5"),
        ("euler_a", V, 5, {"eta": -0.1}, "eta must be between 0 and 1"),
        ("ddpm", V, 5, {"variance": "learned"}, "no variance is named 'learned': choose one of fixed_small"),
        ("ddpm", V, 5, {"clip": 0.0}, "clip must be > 0"),
        ("ddpm", V, 5, {"spacing": "even"}, "no spacing is named 'even': choose one of linspace, leading"),
        ("ddim", V, 5, {"final": "one"}, "no final noise level is named 'one'"),
        ("ddim", V, 2, {"spacing": [999]}, "1 explicit timesteps were given for 2 steps"),
        ("ddim", V, 2, {"spacing": [10, 999]}, "visit a noise level twice"),
        ("ddim", V, 2, {"spacing": [1000, 10]}, "timestep 1000.0 is outside the schedule's 0..999"),
        ("flow_euler", flow(), 2, {"spacing": [1.1, 0.5]}, "sigma 1.1 is not a noise level"),
        ("dpmpp_2m", V, 5, {"solver_type": "bh1"}, "choose one of midpoint, heun"),
        ("dpmpp_3m", V, 5, {"solver_type": "x"}, "choose one of midpoint, heun"),
        ("dpmpp_2m_sde", V, 5, {"solver_type": "x"}, "choose one of midpoint, heun"),
        ("unipc", V, 5, {"solver_type": "midpoint"}, "choose one of bh1, bh2"),
        ("unipc", V, 5, {"order": 4}, "order must be 1, 2 or 3, not 4"),
        ("deis", V, 5, {"order": 0}, "order must be 1, 2 or 3, not 0"),
        ("plms", V, 5, {"average": "x0"}, "choose one of epsilon, output"),
        ("plms", rescale_zero_snr(V), 5, {}, "average='output'"),
        ("lcm", V, 51, {}, "steps <= original_steps"),
        ("lcm", V, 5, {"original_steps": 1001}, "original_steps <= 1000"),
        ("lcm", flow(), 5, {}, "not for path 'flow'"),
        ("edm", edm(), 5, {"s_churn": -1.0}, "must not be negative"),
        ("flow_euler", V, 5, {}, "not for path 'vp'"),
        ("annealed_langevin", flow(), 5, {}, "finite noise level to start from, not path 'flow'"),
        ("annealed_langevin", V, 5, {"langevin_steps": 0}, "langevin_steps must be at least 1, not 0"),
        ("predictor_corrector", V, 5, {"snr": 1.0}, "snr must be between 0 and 1, not 1.0"),
        ("ddim", rescale_zero_snr(linear(1000)), 5, {}, "row 0 has a coefficient that is not finite"),
    ],
)
def test_invalid_settings_are_refused(name, schedule, steps, given, message):
    with pytest.raises(ValueError, match=message):
        make_table(name, schedule, steps, **given)


def test_invalid_tables_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Table([])
    with pytest.raises(ValueError, match="row 1 has a coefficient that is not finite"):
        Table([Row(0.0, (1.0, 0.0), X), Row(0.0, (math.inf, 0.0), X)])


SCHEDULES = [linear(1000, prediction="v"), cosine(300, prediction="x0"), edm(1000), flow(1000, shift=2.0)]


@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    schedule=st.sampled_from(SCHEDULES),
    spacing=st.sampled_from(["linspace", "trailing", "karras", "exponential", "leading"]),
    steps=st.integers(2, 30),
    clip=st.sampled_from([None, 0.5, math.inf]),
)
@settings(max_examples=60, deadline=None)
def test_every_table_is_finite_and_ends_in_the_end_row(name, schedule, spacing, steps, clip):
    given = {"spacing": spacing, "clip": clip, "langevin_steps": 3}
    given = {k: v for k, v in given.items() if k in options(name)}
    if name in ("lcm", "flow_euler", "annealed_langevin"):
        schedule = SCHEDULES[3] if name == "flow_euler" else SCHEDULES[0]
    if name == "plms":
        given |= {"average": "output"} if schedule.alpha_t[-1] == 0 else {}
    table = make_table(name, schedule, steps, **given)
    data = table.data
    assert data.shape == (len(table) + 1, 32)
    assert data[:, list(set(range(32)) - {CLIP})].isfinite().all()
    assert (data[:-1, CLIP] > 0).all()
    assert data[-1, C_IN] == 1
    assert data[-1, TIMESTEP] == 0
    assert data[-1].count_nonzero() == 1
    assert (data[:-1, TIMESTEP].diff() <= 0).all()
    assert 0 < table.init_scale < math.inf
    x = run_table(table, lambda x, t: 0.1 * x, KEYS[:1], (2,), torch.float32)[-1]
    assert x.isfinite().all()


def test_grids():
    """Lin et al. 2024, table 2, and the ends that multistep solvers leave out."""
    T = linear(1000, steps_offset=1)

    def told(spacing, **kw):
        return [p.timestep for p in grid(T, 4, spacing, **kw)]

    assert told("trailing") == [999, 749, 499, 249, 0]
    assert told("leading") == [751, 501, 251, 1, 0]
    assert told("linspace") == [999, 666, 333, 0, 0]
    assert told("linspace", open_end=True) == [999, 749, 500, 250, 0]
    assert told("leading", open_end=True) == [801, 601, 401, 201, 0]
    assert told("linspace", integer=False, open_end=True) == [999, 749.25, 499.5, 249.75, 0]
    assert grid(T, 4)[-1][1:] == (1.0, 0.0)
    assert grid(T, 4, final="sigma_min")[-1].sigma == T.sigma_t[0]
    levels = [p.ratio for p in grid(T, 4, "exponential")[:-1]]
    assert [math.log(a / b) for a, b in pairwise(levels)] == pytest.approx([math.log(levels[0] / levels[-1]) / 3] * 3)

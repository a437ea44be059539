"""The sampling loop: the same sample however it is asked for, guidance, labels, and no host sync."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folders import write_tiny
from torch.utils._python_dispatch import TorchDispatchMode

import diffkern
from diffkern.schedules import Schedule, cosine

SCHEDULE: Schedule = cosine(1000, prediction="v")
SHAPE = (3, 6, 5)
NOISY = ("ddpm", "dpmpp_2m_sde", "euler_a", "lcm")


def pointwise(x, t, *labels):
    """A model in which no sample can touch another, so that batching must not change a bit."""
    shift = sum(label.reshape(-1, 1, 1, 1) * 0.1 for label in labels)
    return torch.tanh(x) * 0.5 - t.reshape(-1, 1, 1, 1) / 2000 + shift


def table(name="dpmpp_2m", steps=5):
    return diffkern.make_table(name, SCHEDULE, steps)


@pytest.fixture(scope="module", name="tiny")
def make_tiny(tmp_path_factory):
    return diffkern.load(write_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("name", ["dpmpp_2m", *NOISY, "unipc", "heun"])
def test_a_sample_is_the_same_alone_and_in_any_batch(name):
    together = diffkern.sample(pointwise, table(name), 7, shape=SHAPE, seed=5)
    for batch_size in (1, 3):
        assert torch.equal(
            together, diffkern.sample(pointwise, table(name), 7, shape=SHAPE, seed=5, batch_size=batch_size)
        )
    some = diffkern.sample(pointwise, table(name), shape=SHAPE, seed=5, sample_ids=[6, 2])
    assert torch.equal(some, together[[6, 2]])
    assert (together[0] - together[1]).abs().max() > 0.1
    other = diffkern.sample(pointwise, table(name), 7, shape=SHAPE, seed=6)
    assert (together - other).abs().max() > 0.1


def test_a_network_gives_the_same_sample_in_any_batch(tiny):
    options: dict[str, Any] = {"seed": 1, "labels": [0, 1, 2, 0, 1], "guidance": 2.0}
    together = diffkern.sample(tiny.model, table(), 5, **options)
    apart = diffkern.sample(tiny.model, table(), 5, **options, batch_size=2)
    assert (together - apart).abs().max() <= 1e-4


def test_conditioning_is_computed_once_for_many_steps(tiny, monkeypatch):
    """A row for each step and each different label, the null label among them; nothing of it in the steps."""
    model, asked = tiny.model, []
    conditioning = model.conditioning

    def counted(timestep, labels):
        asked.append((timestep.tolist(), labels.tolist()))
        return conditioning(timestep, labels)

    options: dict[str, Any] = {"seed": 1, "labels": [0, 2, 2, 0], "guidance": 2.0}
    each_step = diffkern.sample(lambda *args: model(*args), table(), 4, shape=model.sample_shape,
                                null_label=model.null_label, **options)  # fmt: skip
    monkeypatch.setattr(model, "conditioning", counted)
    once = diffkern.sample(model, table(), 4, **options)
    assert (once - each_step).abs().max() <= 1e-4 * once.std()
    timesteps = [t for t in table().timesteps for _ in range(3)]
    assert asked == [(pytest.approx(timesteps), [0, 2, model.null_label] * 5)]

    asked.clear()
    monkeypatch.setattr("diffkern.samplers.step._ROWS", 7)  # two steps of three rows fit
    assert (diffkern.sample(model, table(), 4, **options) - once).abs().max() <= 1e-4 * once.std()
    assert [len(timesteps) for timesteps, _ in asked] == [6, 6, 3]


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_equals_a_plain_loop_of_diffusers(tiny, name):
    """The loop and its op against the loop that users write today, on the same noise."""
    diffusers = pytest.importorskip("diffusers")
    kind = diffusers.DDIMScheduler if name == "ddim" else diffusers.DDPMScheduler
    scheduler = kind(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(5)
    keys = diffkern.noise_keys(3, 2)
    x = diffkern.randn(keys, [3, 8, 8])
    labels = torch.tensor([0, 2])
    for draw, t in enumerate(scheduler.timesteps, start=1):
        with torch.no_grad():
            m = tiny.model(x, t.float(), labels)
        if name == "ddim":
            x = scheduler.step(m, t, x).prev_sample
        else:
            module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
            noise = diffkern.randn(keys, [3, 8, 8], draw)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, lambda *_, noise=noise, **__: noise)
                x = scheduler.step(m, t, x).prev_sample
    made = diffkern.make_table(name, SCHEDULE, 5, spacing="trailing", clip=None)
    got = diffkern.sample(tiny.model, made, 2, seed=3, labels=labels)
    assert (got - x).abs().max() <= 1e-4


def test_guidance_extrapolates_from_the_null_label():
    def linear(x, t, labels):
        return x * 0 + labels.reshape(-1, 1, 1, 1).to(x.dtype)

    def guided(scale, labels):
        row = diffkern.Row(timestep=0.0, x0=(0.0, 1.0), next={"m": 1.0})
        one = diffkern.Table([row])
        return diffkern.sample(linear, one, 2, shape=SHAPE, labels=labels, guidance=scale, null_label=10)[:, 0, 0, 0]

    assert torch.equal(guided(None, [2, 4]), torch.tensor([2.0, 4.0]))
    assert torch.equal(guided(1.0, [2, 4]), torch.tensor([2.0, 4.0]))
    assert torch.equal(guided(3.0, [2, 4]), torch.tensor([10 + 3 * (2 - 10.0), 10 + 3 * (4 - 10.0)]))
    assert torch.equal(guided(torch.tensor([0.0, 2.0]), 4), torch.tensor([10.0, 10 + 2 * (4 - 10.0)]))


def test_guidance_of_one_calls_the_model_once_a_sample():
    sizes = []

    def counting(x, t, labels):
        sizes.append(len(x))
        return x

    for scale in (1.0, 2.0):
        diffkern.sample(counting, table(steps=1), 2, shape=SHAPE, labels=0, guidance=scale, null_label=1)
    assert sizes == [2, 4]


def test_labels_default_to_the_null_label(tiny):
    plain = diffkern.sample(tiny.model, table(), 2)
    assert torch.equal(plain, diffkern.sample(tiny.model, table(), 2, labels=3))
    assert (plain - diffkern.sample(tiny.model, table(), 2, labels=1)).abs().max() > 1e-3


def test_trajectory_and_callback_see_every_step():
    seen: list[diffkern.Progress] = []
    out, path = diffkern.sample(
        pointwise, table(steps=4), 5, shape=SHAPE, seed=2, batch_size=2, trajectory=True, callback=seen.append
    )
    assert path.shape == (5, 5, *SHAPE)
    assert torch.equal(path[-1], out)
    assert torch.equal(path[0], diffkern.randn(diffkern.noise_keys(2, 5), list(SHAPE)))
    assert [p.step for p in seen] == [0, 1, 2, 3] * 3
    assert [p.timestep for p in seen[:4]] == table(steps=4).timesteps
    assert torch.equal(torch.cat([p.x for p in seen if p.step == 1]), path[2])
    assert torch.equal(seen[-1].sample_ids, torch.tensor([4]))


def test_the_model_is_called_in_its_own_dtype_and_the_state_stays_float32(tiny, tmp_path):
    half = diffkern.load(write_tiny(tmp_path), dtype=torch.bfloat16)
    got = diffkern.sample(half.model, table(), 3, labels=1, guidance=2.0)
    full = diffkern.sample(tiny.model, table(), 3, labels=1, guidance=2.0)
    assert got.dtype == torch.float32
    # bfloat16 has 8 bits: a few rounding errors of 2^-8 on values around 1 after five guided steps
    assert (got - full).abs().mean() < 0.03
    assert not torch.equal(got, full)


class _NoSync(TorchDispatchMode):
    """Fails when the host asks the device for a number, from the first step until the last has begun."""

    def __init__(self, steps):
        super().__init__()
        self.last, self.inside = steps - 1, False

    def watch(self, progress):
        self.inside = progress.step < self.last

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not (self.inside and "_local_scalar_dense" in func.name()), "the host asked the device for a number"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddpm", "unipc"])
def test_no_host_sync_in_the_loop(tiny, name):
    with diffkern.use_backend("reference"), _NoSync(len(table(name))) as mode:
        diffkern.sample(tiny.model, table(name), 2, labels=1, guidance=2.0, callback=mode.watch)


def test_the_host_sync_test_can_fail():
    def asks(x, t):
        return x * float(x.mean())

    with pytest.raises(AssertionError, match="asked the device"), _NoSync(5) as mode:
        diffkern.sample(asks, table(), 2, shape=SHAPE, callback=mode.watch)


def test_no_samples_is_an_empty_batch():
    assert diffkern.sample(pointwise, table(), 0, shape=SHAPE).shape == (0, *SHAPE)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "n < 0": ({"n": -1}, "n must be at least 0, not -1"),
    "batch_size 0": ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    "no shape": ({"shape": None}, "give the shape of one sample"),
    "too few labels": ({"labels": [1], "n": 2}, "labels must be one or 2 numbers"),
    "too few ids": ({"sample_ids": [1], "n": 2}, "n is 2 but there are 1 sample_ids"),
    "guidance without a null label": ({"labels": 1, "guidance": 2.0}, "needs the model's null label"),
    "guidance without labels": ({"null_label": 1, "guidance": 2.0}, "guidance needs labels"),
    "guidance of NaN": ({"labels": 1, "null_label": 1, "guidance": float("nan")}, "one or 2 finite numbers"),
    "a seed too large": ({"seed": 1 << 64}, "does not fit in 64 bits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_get_a_sentence(name):
    changes, message = WRONG[name]
    given: dict[str, Any] = {"n": 2, "shape": SHAPE, **changes}
    with pytest.raises(ValueError, match=message):
        diffkern.sample(pointwise, table(), **given)

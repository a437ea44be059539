"""AutoencoderKL against diffusers' on the same weights, and the folder format in both directions."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkern import noise_keys, randn
from diffkern.models import autoencoder_kl
from diffkern.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior
from diffkern.models.folder import WEIGHTS, ModelError
from diffkern.ops.randn import Draw

diffusers = pytest.importorskip("diffusers")


def config(*channels: int, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": 8,
        **more,
    }


FLUX: dict[str, Any] = {
    "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
    "use_post_quant_conv": False, "force_upcast": True,
}  # fmt: skip
# The VAE of Playground 2.5 says so.
MOMENTS: dict[str, Any] = {
    "scaling_factor": 0.5,
    "latents_mean": (-1.6574, 1.886, -1.383, 2.5155), "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "two levels": config(16, 24),
    "one level": config(16),
    "Stable Diffusion, narrow": config(8, 16, 32, 32, layers_per_block=2),
    "Flux, narrow": config(8, 16, 32, 32, layers_per_block=2, **FLUX),
    "no attention in the middle": config(16, 24, mid_block_add_attention=False),
    "no convolution behind the encoder": config(16, 24, use_quant_conv=False),
    "other channels": config(24, 8, 16, in_channels=1, out_channels=2, latent_channels=3),
}


def make_theirs(name: str):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**VARIANTS[name]).eval()
    for p in model.parameters():  # biases and affine parameters that matter, not diffusers' zeros and ones
        torch.nn.init.normal_(p, std=0.1) if p.dim() < 2 else None
    return model


def inputs(model, height: int = 5, width: int = 3, seed: int = 1):
    """Pictures and latents of a size, in latents; the pictures are not a multiple of it."""
    g = torch.Generator().manual_seed(seed)
    c, factor = model.config, 2 ** (len(model.config.block_out_channels) - 1)
    x = torch.rand(3, c.in_channels, height * factor + 1, width * factor + factor // 2, generator=g) * 2 - 1
    return x, torch.randn(3, c.latent_channels, height, width, generator=g)


def all_of(model, x, z):
    """What a model makes of pictures and latents: mean, logvar and pictures, whoever wrote it."""
    with torch.no_grad():
        encoded, decoded = model.encode(x), model.decode(z)
    posterior = getattr(encoded, "latent_dist", encoded)
    return posterior.mean, posterior.logvar, getattr(decoded, "sample", decoded)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name, tmp_path):
    """In float64: in float32 its GroupNorm alone is off by up to 3e-4, 40 times as much as a whole model here."""
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    theirs.double()
    ours = AutoencoderKL.from_folder(tmp_path)
    x, z = inputs(theirs)
    for got, expected in zip(all_of(ours, x, z), all_of(theirs, x.double(), z.double()), strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.std()
        assert expected.std() > 0.01, "an output of zeros would prove nothing"
        assert got.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = theirs(x.double()).sample
        assert (ours(x) - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("name", ["two levels", "Stable Diffusion, narrow"])
def test_bfloat16_is_as_right_as_diffusers(name, tmp_path):
    theirs = make_theirs(name).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_folder(tmp_path, torch.bfloat16)
    exact = copy.deepcopy(ours).double()
    errors = torch.zeros(2, 3, dtype=torch.float64)  # of ours and theirs; mean, logvar, pictures
    for seed in range(32):  # on a few of them either may be nearer by chance
        x, z = (t.bfloat16() for t in inputs(theirs, seed=seed))
        results = all_of(exact, x, z)
        for i, model in enumerate((ours, theirs)):
            for j, (got, right) in enumerate(zip(all_of(model, x, z), results, strict=True)):
                assert got.dtype == torch.bfloat16
                errors[i, j] += (got.double() - right).square().mean()
    assert (errors[0] <= errors[1]).all()


def test_writes_what_diffusers_reads(tmp_path):
    theirs = make_theirs("Flux, narrow")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoencoderKL.from_folder(tmp_path / "theirs")
    ours.save(tmp_path / "ours", dtype=torch.float32)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    for got, expected in zip(all_of(again, *inputs(theirs)), all_of(theirs, *inputs(theirs)), strict=True):
        assert torch.equal(got, expected)
    state = load_file(tmp_path / "ours" / WEIGHTS)
    assert all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())
    for key, value in FLUX.items():
        assert again.config[key] == value


def test_defaults_are_those_of_diffusers():
    """Published configs leave keys out: that of Stable Diffusion 1.5 has no scaling_factor."""
    expected = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    assert {f.name: f.default for f in fields(AutoencoderKLConfig)} == {
        name: p.default for name, p in expected.items() if name != "self"
    }


def test_gradients_equal_diffusers(tmp_path):
    theirs = make_theirs("two levels")
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_folder(tmp_path).train()
    x, _ = inputs(theirs)
    posterior = theirs.encode(x).latent_dist
    (theirs.decode(posterior.mode()).sample.square().mean() + posterior.logvar.mean()).backward()
    mean, logvar = ours.encode(x)
    (ours.decode(mean).square().mean() + logvar.mean()).backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.fixture(name="model")
def make_model():
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(**VARIANTS["two levels"])).eval()


def test_logvar_is_clamped_as_in_diffusers(model):
    assert model.quant_conv is not None
    with torch.no_grad():
        model.quant_conv.bias[4:].copy_(torch.tensor([-100.0, 100.0, 0.0, 5.0]))
        logvar = model.encode(torch.zeros(1, 3, 4, 4)).logvar
    assert (logvar[:, 0] == -30).all()
    assert (logvar[:, 1] == 20).all()
    assert (logvar[:, 2:].abs() < 10).all()


def test_a_draw_is_the_mean_and_its_noise():
    mean, logvar = torch.randn(2, 2, 4, 3, 5).unbind(0)
    keys = noise_keys(7, 2)
    expected = mean + torch.exp(logvar / 2) * randn(keys, [4, 3, 5], int(Draw.VAE))
    torch.testing.assert_close(Posterior(mean, logvar).sample(keys), expected)


@pytest.mark.parametrize(
    ("more", "mean", "std"),
    [
        ({}, 0.0, 1 / 0.18215),
        ({"scaling_factor": 0.3611, "shift_factor": -0.1159}, -0.1159, 1 / 0.3611),
        (
            MOMENTS,
            torch.tensor(MOMENTS["latents_mean"])[:, None, None],
            torch.tensor(MOMENTS["latents_std"])[:, None, None] / 0.5,
        ),
    ],
    ids=["scale", "scale and shift", "mean and std"],
)
def test_latents_are_standardised_as_in_the_pipelines_of_diffusers(more, mean, std):
    """diffusers decodes latents / scaling_factor + shift_factor, or latents * latents_std / scaling_factor +
    latents_mean."""
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderKLConfig(**VARIANTS["two levels"], **more)).eval()
    x, z = inputs(model)
    keys = noise_keys(3, 3)
    with torch.no_grad():
        posterior = model.encode(x)
        torch.testing.assert_close(model.to_latents(x), (posterior.mean - mean) / std)
        torch.testing.assert_close(model.to_latents(x, keys), (posterior.sample(keys) - mean) / std)
        torch.testing.assert_close(model.to_pictures(z), model.decode(z * std + mean))


def test_latents_of_a_sampler_become_pictures_of_a_bfloat16_model(model):
    """Samplers give float32 whatever the dtype of the models."""
    model.bfloat16()
    with torch.no_grad():
        pictures = model.to_pictures(torch.ones(2, 4, 3, 5))
        assert torch.equal(pictures, model.decode(torch.full((2, 4, 3, 5), 1 / 0.18215, dtype=torch.bfloat16)))
    assert pictures.shape == (2, 3, 6, 10)
    assert pictures.dtype == torch.bfloat16


@pytest.mark.parametrize(("height", "width", "at_once"), [(8, 8, [3]), (16, 8, [2, 1]), (20, 20, [1, 1, 1])])
def test_a_batch_is_worked_on_in_parts_of_so_many_pixels(model, monkeypatch, height, width, at_once):
    monkeypatch.setattr(autoencoder_kl, "PIXELS", 16 * 16)
    x = torch.rand(3, 3, height, width) * 2 - 1
    sizes: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for name, seen in sizes.items():
        getattr(model, name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
    with torch.no_grad():
        got = model(x)
        assert sizes == {"encoder": at_once, "decoder": at_once}
        alone = torch.cat([model(one) for one in x.split(1)])
    assert (got - alone).abs().max() <= 1e-5 * alone.std()  # oneDNN may sum another batch in another order


def test_no_picture_at_all(model):
    with torch.no_grad():
        assert model.encode(torch.zeros(0, 3, 8, 8)).mean.shape == (0, 4, 4, 4)
        assert model.decode(torch.zeros(0, 4, 4, 4)).shape == (0, 3, 8, 8)


@pytest.fixture(name="saved")
def make_saved(model, tmp_path):
    model.save(tmp_path, torch.float32)
    return tmp_path


def test_old_attention_names_load(saved):
    """Those of Stable Diffusion 1 and 2 as published."""
    state = load_file(saved / WEIGHTS)
    new = AutoencoderKL.from_folder(saved).state_dict()
    for old, name in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {k.replace(f".{name}.", f".{old}."): v for k, v in state.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, saved / WEIGHTS)
    assert all(torch.equal(v, new[k]) for k, v in AutoencoderKL.from_folder(saved).state_dict().items())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "AutoencoderTiny"}, "holds a AutoencoderTiny, not a AutoencoderKL"),
    "another block down": (
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        "down_block_types 'AttnDownEncoderBlock2D': allowed here is DownEncoderBlock2D",
    ),
    "another block up": ({"up_block_types": ["UpBlock2D"] * 2}, "'UpBlock2D': allowed here is UpDecoderBlock2D"),
    "another activation": ({"act_fn": "relu"}, "act_fn 'relu': allowed here is silu, swish"),
    "lists of two lengths": ({"block_out_channels": [16]}, "differ in length"),
    "no levels": (
        {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
        r"block_out_channels \(\): allowed here is 1 to 65536",
    ),
    "no layer": ({"layers_per_block": 0}, "layers_per_block 0: allowed here is 1 to 64"),
    "groups that do not divide": ({"norm_num_groups": 7}, "norm_num_groups 7 does not divide"),
    "one of two moments": ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std together or neither"),
    "moments of other channels": ({"latents_mean": [0.0], "latents_std": [1.0]}, "1 numbers in latents_mean, not 4"),
    "two ways to shift": ({**MOMENTS, "shift_factor": 0.1}, "both latents_mean and shift_factor"),
    "no scale": ({"scaling_factor": 0}, "scaling_factor 0: this must be above 0"),
    "a negative scale": ({"scaling_factor": -1}, "scaling_factor -1: this must be float, numbers from 0 to 65536"),
    "no spread": ({**MOMENTS, "latents_std": [1, 0, 1, 1]}, r"latents_std \(1, 0, 1, 1\): this must be above 0"),
    "a huge shift": ({"shift_factor": 1e9}, "shift_factor 1000000000.0: .* numbers from -65536 to 65536"),
    "text for a number": ({"latent_channels": "four"}, "latent_channels 'four': this must be int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_gets_a_sentence(saved, name):
    changes, message = WRONG[name]
    given = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**given, **changes}))
    with pytest.raises(ModelError, match=message):
        AutoencoderKL.from_folder(saved)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 1)])
def test_wrong_pictures_get_a_sentence(model, shape):
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\], H and W at least 2, not \["):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 3, 8, 8), (1, 4, 0, 8)])
def test_wrong_latents_get_a_sentence(model, shape):
    with pytest.raises(ValueError, match=r"z must be \[B, 4, H, W\], H and W at least 1, not \["):
        model.decode(torch.zeros(shape))

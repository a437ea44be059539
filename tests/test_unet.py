"""UNet2D against diffusers' UNet2DModel on the same weights, and the folder format in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkern import use_backend
from diffkern.available import availability, triton_interpreted
from diffkern.models.blocks import Downsample, Picture
from diffkern.models.folder import WEIGHTS, ModelError
from diffkern.models.unet import UNet2D
from diffkern.testing import ulp

diffusers = pytest.importorskip("diffusers")

TINY: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class-conditional": {"num_class_embeds": 10},
    "two layers": {"layers_per_block": 2},
    # The shape of google/ddpm-cifar10-32, made narrow.
    "ddpm-cifar10-32": {
        "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0, "flip_sin_to_cos": False,
        "freq_shift": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "layers_per_block": 2, "act_fn": "silu",
        "block_out_channels": [16, 32, 32, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "scaled mid block, centred input": {"mid_block_scale_factor": 1.4142, "center_input_sample": True},
    "no attention in the middle": {"add_attention": False},
    "other channels": {"in_channels": 4, "out_channels": 8, "sample_size": [8, 16]},
}  # fmt: skip


@pytest.fixture(params=VARIANTS, name="theirs")
def make_theirs(request):
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**{**TINY, **VARIANTS[request.param]}).eval()
    for p in model.parameters():  # biases and affine parameters that matter, not diffusers' zeros and ones
        torch.nn.init.normal_(p, std=0.1) if p.dim() < 2 else None
    return model


def call(theirs, ours, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    _, *size = ours.sample_shape
    x = torch.randn(3, theirs.config.in_channels, *size, generator=g).to(dtype)
    t = torch.tensor([0.0, 37.5, 999.0])
    labels = torch.tensor([0, 9, 4]) if theirs.config.num_class_embeds else None
    with torch.no_grad():
        return theirs(x, t, labels).sample, ours(x, t, labels)


def test_equals_diffusers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    expected, got = call(theirs, UNet2D.from_folder(tmp_path))
    assert (got - expected).abs().max() <= 1e-4 * expected.std()
    assert expected.std() > 0.01, "an output of zeros would prove nothing"
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_writes_what_diffusers_reads(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet2D.from_folder(tmp_path / "theirs")
    ours.save(tmp_path / "ours", dtype=torch.float32)
    expected, got = call(diffusers.UNet2DModel.from_pretrained(tmp_path / "ours").eval(), ours)
    assert (got - expected).abs().max() <= 1e-4
    state = load_file(tmp_path / "ours" / WEIGHTS)
    assert all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())
    assert not list((tmp_path / "ours").glob(".writing-*"))


def test_gradients_equal_diffusers(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**TINY)
    theirs.save_pretrained(tmp_path)
    ours = UNet2D.from_folder(tmp_path).train()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 500])
    theirs(x, t).sample.square().mean().backward()
    ours(x, t).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_downsampling_pads_as_the_module_says(padding):
    down = Downsample(4, padding)
    x = torch.randn(2, 4, 7, 8)
    expected = down.conv(x if padding else torch.nn.functional.pad(x, (0, 1, 0, 1)))
    with torch.no_grad():
        torch.testing.assert_close(down(Picture(x)).pixels, expected)


@pytest.mark.skipif(
    availability("triton") is not None or not triton_interpreted(), reason="runs the kernels in Triton's interpreter"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_unet_in_triton_kernels(saved, dtype):
    """As one op is judged: by float64, and by what the references make of this dtype."""
    model = UNet2D.from_folder(saved, dtype)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    with torch.no_grad():
        for backend in ("triton", "reference"):
            with use_backend(backend):
                results.append(model(x, torch.tensor([37.5])).double())
        with use_backend("reference"):
            exact = model.double()(x.double(), torch.tensor([37.5]))
    got, plain = ((y - exact).abs().max() for y in results)
    assert got <= 2 * plain + ulp(exact.std(), dtype)
    assert exact.std() > 0.01, "an output of zeros would prove nothing"


@pytest.fixture(name="saved")
def make_saved(tmp_path):
    torch.manual_seed(0)
    diffusers.UNet2DModel(**TINY).save_pretrained(tmp_path)
    return tmp_path


def test_old_attention_names_load(saved):
    state = load_file(saved / WEIGHTS)
    new = UNet2D.from_folder(saved).state_dict()
    for old, name in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {k.replace(f".{name}.", f".{old}."): v for k, v in state.items()}
    save_file(state, saved / WEIGHTS)
    assert all(torch.equal(v, new[k]) for k, v in UNet2D.from_folder(saved).state_dict().items())


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a left-over weight": (
        lambda f: edit_weights(f, lambda s: s.update({"extra.weight": torch.ones(1)})),
        r"the weight 'extra\.weight', which",
    ),
    "a missing weight": (
        lambda f: edit_weights(f, lambda s: s.pop("conv_in.bias")),
        r"lacks 1 weights .*'conv_in\.bias'",
    ),
    "a wrong shape": (
        lambda f: edit_weights(f, lambda s: s.update({"conv_in.bias": torch.ones(3)})),
        r"'conv_in\.bias' has shape \(3,\), the config asks for \(16,\)",
    ),
    "a wrong dtype": (
        lambda f: edit_weights(f, lambda s: s.update({"conv_in.bias": torch.ones(16, dtype=torch.int32)})),
        r"'conv_in\.bias' has dtype torch\.int32",
    ),
    "truncated weights": (truncate, "corrupt or truncated"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "corrupt or truncated"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "pickled weights are never read"),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "another class": (lambda f: edit_config(f, _class_name="VQModel"), "holds a VQModel, not a UNet2DModel"),
    "an unknown block": (
        lambda f: edit_config(f, down_block_types=["DownBlock2D", "SkipDownBlock2D"]),
        "down_block_types 'SkipDownBlock2D': allowed here is DownBlock2D, AttnDownBlock2D",
    ),
    "an unknown activation": (lambda f: edit_config(f, act_fn="relu"), "act_fn 'relu': allowed here is silu, swish"),
    "no groups": (lambda f: edit_config(f, norm_num_groups=0), "norm_num_groups 0: allowed here is 1 to 65536"),
    "no levels": (
        lambda f: edit_config(f, block_out_channels=[], down_block_types=[], up_block_types=[]),
        r"block_out_channels \(\): allowed",
    ),
    "groups that do not divide": (lambda f: edit_config(f, norm_num_groups=7), "norm_num_groups 7"),
    "lists of two lengths": (lambda f: edit_config(f, block_out_channels=[16]), "differ in length"),
    "text for a number": (lambda f: edit_config(f, layers_per_block="two"), "layers_per_block 'two': this must be int"),
    "a negative number": (lambda f: edit_config(f, in_channels=-3), "in_channels -3: this must be int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_folder_gets_a_sentence(saved, name):
    spoil, message = WRONG[name]
    spoil(saved)
    with pytest.raises(ModelError, match=message):
        UNet2D.from_folder(saved)


def test_no_folder_gets_a_sentence(tmp_path):
    with pytest.raises(ModelError, match="not a folder with a model"):
        UNet2D.from_folder(tmp_path / "nowhere")


def test_labels_are_given_exactly_if_the_model_takes_them(saved):
    model = UNet2D.from_folder(saved)
    with pytest.raises(ValueError, match="takes no labels"):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))

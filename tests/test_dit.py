"""DiT against diffusers' DiTTransformer2DModel on the same weights, and the folder format in both directions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffkern
from diffkern.cli import main
from diffkern.models.dit import DiT, DiTConfig
from diffkern.models.folder import WEIGHTS, ModelError

diffusers = pytest.importorskip("diffusers")

TINY: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 8,
    "patch_size": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned sigma": {"out_channels": 6},
    "affine norms, no attention bias": {"norm_elementwise_affine": True, "attention_bias": False},
    "one layer, single pixels": {"num_layers": 1, "patch_size": 1},
    # DiT-S/2 has 12 layers.
    "DiT-S/2 width": {
        "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8, "sample_size": 32,
        "num_embeds_ada_norm": 10,
    },
}  # fmt: skip
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000}


def make_theirs(name: str):
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**{**TINY, **VARIANTS[name]}).eval()
    for p in model.parameters():  # biases and affine parameters that matter, not diffusers' zeros and ones
        torch.nn.init.normal_(p, std=0.1) if p.dim() < 2 else None
    return model


def inputs(config, batch: int = 3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=g)
    return x, torch.tensor([0.0, 37.5, 999.0])[:batch], torch.tensor([0, 4, 5])[:batch]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = DiT.from_folder(tmp_path)
    call = inputs(theirs.config)
    with torch.no_grad():
        expected, got = theirs(*call).sample, ours(*call, with_sigma=True)
        prediction = ours(*call)
    assert (got - expected).abs().max() <= 1e-4 * expected.std()
    assert expected.std() > 0.01, "an output of zeros would prove nothing"
    assert torch.equal(prediction, got[:, : theirs.config.in_channels])
    assert got.is_contiguous()
    assert prediction.is_contiguous()


@pytest.mark.parametrize("name", ["plain", "DiT-S/2 width"])
def test_bfloat16_is_as_right_as_diffusers(name, tmp_path):
    theirs = make_theirs(name).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = DiT.from_folder(tmp_path, torch.bfloat16)
    x, t, labels = inputs(theirs.config)
    x = x.bfloat16()
    oracle = copy.deepcopy(ours).double()
    with torch.no_grad():
        exact = oracle(x.double(), t.double(), labels, with_sigma=True)
        ours_error, theirs_error = (
            (y.double() - exact).square().mean()
            for y in (ours(x, t, labels, with_sigma=True), theirs(x, t, labels).sample)
        )
    assert ours_error <= theirs_error


def test_writes_what_diffusers_reads(tmp_path):
    theirs = make_theirs("learned sigma")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DiT.from_folder(tmp_path / "theirs")
    ours.save(tmp_path / "ours", dtype=torch.float32)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    call = inputs(theirs.config)
    with torch.no_grad():
        assert (again(*call).sample - ours(*call, with_sigma=True)).abs().max() <= 1e-4
    state = load_file(tmp_path / "ours" / WEIGHTS)
    assert all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())


def test_gradients_equal_diffusers(tmp_path):
    theirs = make_theirs("affine norms, no attention bias")
    theirs.save_pretrained(tmp_path)
    ours = DiT.from_folder(tmp_path)
    call = inputs(theirs.config)
    theirs(*call).sample.square().mean().backward()
    ours(*call).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_picture_of_another_size_equals_diffusers(tmp_path):
    theirs = make_theirs("plain")
    theirs.save_pretrained(tmp_path)
    x, t, labels = inputs(theirs.config)
    x = torch.cat([x, x], dim=2).repeat(1, 1, 1, 2)
    with torch.no_grad():
        expected = theirs(x, t, labels).sample
        assert (DiT.from_folder(tmp_path)(x, t, labels) - expected).abs().max() <= 1e-4 * expected.std()


@pytest.fixture(name="model")
def make_model():
    torch.manual_seed(0)
    return DiT(DiTConfig(**TINY)).eval()


def test_a_sample_alone_equals_itself_in_a_batch(model):
    x, t, labels = inputs(model.config)
    with torch.no_grad():
        together = model(x, t, labels)
        for i in range(3):
            alone = model(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
            assert (alone - together[i : i + 1]).abs().max() <= 1e-5


def test_conditioning_of_a_whole_run_is_that_of_its_steps(model):
    x, t, labels = inputs(model.config)
    with torch.no_grad():
        run = model.conditioning(t.repeat_interleave(3), labels.repeat(3)).unflatten(1, (3, 3))
        for i in range(3):
            expected = model(x, t[i].expand(3), labels)
            assert (model(x, conditioning=run[:, i]) - expected).abs().max() <= 1e-5


def test_what_is_missing_gets_a_sentence(model):
    x, t, _ = inputs(model.config)
    with pytest.raises(ValueError, match="needs a timestep and class labels, or its conditioning"):
        model(x, t)
    with pytest.raises(ValueError, match="x is 8 by 7, both must be multiples of the patch size 2"):
        model(x[..., :7], t, torch.zeros(3, dtype=torch.int64))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel, not a DiTTransformer2DModel"),
    "another norm": ({"norm_type": "ada_norm"}, "norm_type 'ada_norm': allowed here is ada_norm_zero"),
    "another activation": ({"activation_fn": "geglu"}, "activation_fn 'geglu': allowed here is gelu-approximate"),
    "dropout": ({"dropout": 0.1}, r"dropout 0\.1: allowed here is 0\.0"),
    "no layer": ({"num_layers": 0}, "num_layers 0: allowed here is 1 to 256"),
    "a patch larger than the picture": ({"sample_size": 1}, "sample_size 1: allowed here is 2 to 65536"),
    "an odd width": ({"attention_head_dim": 7}, "attention_head_dim 14: .* need a multiple of 4"),
    "no labels": ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm None: this must be int"),
    "text for a number": ({"num_layers": "two"}, "num_layers 'two': this must be int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_gets_a_sentence(model, tmp_path, name):
    changes, message = WRONG[name]
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=message):
        DiT.from_folder(tmp_path)


@pytest.fixture(name="pipeline")
def make_pipeline(tmp_path) -> Path:
    """A pipeline's folder with a DiT of learned sigma."""
    torch.manual_seed(0)
    DiT(DiTConfig(**TINY, out_channels=6)).save(tmp_path / "dit" / "transformer", torch.float32)
    (tmp_path / "dit" / "scheduler").mkdir()
    (tmp_path / "dit" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return tmp_path / "dit"


def test_a_pipeline_loads_and_samples(pipeline):
    loaded = diffkern.load(pipeline)
    assert isinstance(loaded.model, DiT)
    assert loaded.model.null_label == 5
    assert loaded.label_id("4") == 4
    with pytest.raises(ValueError, match="no label is named '5': choose one of 0, 1, 2, 3, 4"):
        loaded.label_id("5")
    table = diffkern.make_table("ddim", loaded.schedule, 3)
    both = diffkern.sample(loaded.model, table, 2, labels=[1, 4], guidance=3.0)
    told_each_step = diffkern.sample(
        lambda *args: loaded.model(*args), table, 2, shape=loaded.model.sample_shape,
        null_label=loaded.model.null_label, labels=[1, 4], guidance=3.0,
    )  # fmt: skip
    assert (both - told_each_step).abs().max() <= 1e-4 * both.std()
    assert both.shape == (2, 3, 8, 8)
    second = diffkern.sample(loaded.model, table, sample_ids=[1], labels=4, guidance=3.0)
    assert (second - both[1:]).abs().max() <= 1e-4


def test_labels_may_have_names(pipeline):
    (pipeline / "labels.json").write_text(json.dumps({"labels": ["cat", "dog"]}))
    loaded = diffkern.load(pipeline)
    assert loaded.label_id("dog") == 1
    assert loaded.model.null_label == 5


def test_the_command_line_draws_with_it(pipeline, tmp_path, capsys):
    arguments = ["sample", "--model", str(pipeline), "--label", "2", "--steps", "2", "-n", "2"]
    assert main([*arguments, "--out", str(tmp_path / "x.png")]) == 0
    assert "guidance 3" in capsys.readouterr().out
    assert (tmp_path / "x.png").is_file()


def test_another_class_gets_a_sentence(pipeline):
    file = pipeline / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ModelError, match=r"holds a FluxTransformer2DModel: allowed here is UNet2DModel, .*, DiT"):
        diffkern.load(pipeline)

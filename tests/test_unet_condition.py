"""UNet2DCondition against diffusers' UNet2DConditionModel on the same weights, and the folder format both ways."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffkern
from diffkern.cli import main
from diffkern.models.blocks import Upsample
from diffkern.models.folder import WEIGHTS, ModelError
from diffkern.models.unet_condition import UNet2DCondition, UNet2DConditionConfig
from diffkern.schedules import scaled_linear

diffusers = pytest.importorskip("diffusers")

# Shaped as the named models are, made narrow; keys as their config.json have them.
SD1: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 2, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2, "cross_attention_dim": 12, "mid_block_scale_factor": 1,
}  # fmt: skip
SDXL: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2, 4], "cross_attention_dim": 24, "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True, "upcast_attention": None, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 10 + 6 * 8,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "SD 1.5": SD1,
    "SD 1.5 inpainting": {**SD1, "in_channels": 9},
    "SD 2": {**SD1, "attention_head_dim": [1, 4], "use_linear_projection": True, "upcast_attention": True},
    "SDXL": SDXL,
    "SDXL refiner": {
        **SDXL, "transformer_layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "LCM": {**SD1, "time_cond_proj_dim": 6},
    "x4 upscaler": {**SD1, "num_class_embeds": 5},
    "an odd size": {
        **SD1, "sample_size": [7, 10], "block_out_channels": [16, 16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "no middle": {**SD1, "mid_block_type": None, "layers_per_block": [1, 2]},
    "scaled middle, centred input": {
        **SD1, "mid_block_scale_factor": 1.4142, "center_input_sample": True,
        "resnet_time_scale_shift": "scale_shift", "flip_sin_to_cos": False, "freq_shift": 1,
    },
}  # fmt: skip


def make_theirs(name: str):
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**VARIANTS[name]).eval()
    for p in model.parameters():  # biases and affine parameters that matter, not diffusers' zeros and ones
        torch.nn.init.normal_(p, std=0.1) if p.dim() < 2 else None
    return model


def inputs(config, rows: int = 3, dtype=torch.float32) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    """x, timestep and prompt for a batch of 3, and what else this model is told, in so many rows."""
    g = torch.Generator().manual_seed(1)
    size = config.sample_size
    x = torch.randn(3, config.in_channels, *([size] * 2 if isinstance(size, int) else size), generator=g)
    text = torch.randn(rows, 5, config.cross_attention_dim, generator=g)
    told = {}
    if config.addition_embed_type:
        told["text_embeds"] = torch.randn(rows, 10, generator=g)
        told["time_ids"] = torch.tensor([[1024.0, 768, 0, 16, 1024, 768]]) * torch.arange(1, rows + 1)[:, None]
    if config.time_cond_proj_dim:
        told["timestep_cond"] = torch.randn(rows, config.time_cond_proj_dim, generator=g)
    told = {k: v.to(dtype) for k, v in told.items()}
    if config.num_class_embeds:
        told["class_labels"] = torch.tensor([0, 4, 2])[:rows]
    return (x.to(dtype), torch.tensor([0.0, 37.5, 999.0]), text.to(dtype)), told


def call_theirs(model, args, told, **more):
    added = {k: told[k] for k in ("text_embeds", "time_ids") if k in told}
    rest = {k: v for k, v in told.items() if k not in added}
    return model(*args, added_cond_kwargs=added, **rest, **more).sample


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    args, told = inputs(theirs.config)
    with torch.no_grad():
        expected, got = call_theirs(theirs, args, told), UNet2DCondition.from_folder(tmp_path)(*args, **told)
    assert (got - expected).abs().max() <= 1e-4 * expected.std()
    assert expected.std() > 0.01, "an output of zeros would prove nothing"
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2", "SDXL"])
def test_bfloat16_is_as_right_as_diffusers(name, tmp_path):
    theirs = make_theirs(name).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = UNet2DCondition.from_folder(tmp_path, torch.bfloat16)
    args, told = inputs(theirs.config, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = copy.deepcopy(ours).double()(*(a.double() for a in args), **{k: v.double() for k, v in told.items()})
        ours_error, theirs_error = (
            (y.double() - exact).square().mean() for y in (ours(*args, **told), call_theirs(theirs, args, told))
        )
    assert ours_error <= theirs_error


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "LCM"])
def test_writes_what_diffusers_reads(name, tmp_path):
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet2DCondition.from_folder(tmp_path / "theirs")
    ours.save(tmp_path / "ours", dtype=torch.float32)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours").eval()
    args, told = inputs(theirs.config)
    with torch.no_grad():
        assert (call_theirs(again, args, told) - ours(*args, **told)).abs().max() <= 1e-4
    state = load_file(tmp_path / "ours" / WEIGHTS)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())


def test_gradients_equal_diffusers(tmp_path):
    theirs = make_theirs("SD 2")
    theirs.save_pretrained(tmp_path)
    ours = UNet2DCondition.from_folder(tmp_path).train()
    args, told = inputs(theirs.config)
    call_theirs(theirs, args, told).square().mean().backward()
    ours(*args, **told).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_mask_equals_that_of_diffusers(tmp_path):
    theirs = make_theirs("SD 1.5")
    theirs.save_pretrained(tmp_path)
    args, _ = inputs(theirs.config)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    ours = UNet2DCondition.from_folder(tmp_path)
    with torch.no_grad():
        expected = theirs(*args, encoder_attention_mask=mask).sample
        got = ours(*args, mask=mask)
        assert (got - ours(*args)).abs().max() > 0.01 * expected.std()
    assert (got - expected).abs().max() <= 1e-4 * expected.std()


def test_a_controlnet_equals_that_of_diffusers(tmp_path):
    theirs = make_theirs("SD 1.5")
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(1)
    control = diffusers.ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=(4, 8)).eval()
    for p in control.parameters():  # its last convolutions are made zero
        torch.nn.init.normal_(p, std=0.1)
    args, _ = inputs(theirs.config)
    ours = UNet2DCondition.from_folder(tmp_path)
    with torch.no_grad():
        down, mid = control(*args, controlnet_cond=torch.rand(3, 3, 16, 16), return_dict=False)
        expected = theirs(*args, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        got = ours(*args, down_residuals=down, mid_residual=mid)
        assert (got - ours(*args)).abs().max() > 0.01 * expected.std()
    assert (got - expected).abs().max() <= 1e-4 * expected.std()
    assert got.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=f"takes {len(down)} down_residuals, not {len(down) - 1}"):
        ours(*args, down_residuals=down[1:])


@pytest.mark.parametrize(("n", "size"), [(4, 7), (4, 8)])
def test_upsampling_to_a_size_is_that_of_the_rounded_one(n, size):
    up = Upsample(4)
    x = torch.randn(2, 4, n, n)
    expected = up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :size, :size])
    with torch.no_grad():
        torch.testing.assert_close(up(x, torch.Size([size, size])), expected)


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_nothing_changes_the_layout(name):
    """No picture is copied from one layout to another on the way: PyTorch would count the copies."""
    model = make_ours(name)
    args, told = inputs(model.config)
    with torch.no_grad():
        prompt = model.given(args[2], **told)
        x = args[0].contiguous(memory_format=torch.channels_last)
        rows = model.conditioning(args[1], **told)
        prompt(x, conditioning=rows)
        with torch.profiler.profile(record_shapes=True) as profile:
            prompt(x, conditioning=rows)
    copies = [e for e in profile.events() if e.name == "aten::clone" and e.input_shapes]
    assert not [e.input_shapes for e in copies if len(e.input_shapes[0]) > 2]


def make_ours(name: str) -> UNet2DCondition:
    torch.manual_seed(0)
    return UNet2DCondition(UNet2DConditionConfig.from_dict(VARIANTS[name])).eval()


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_what_is_computed_once_is_what_a_call_computes(name):
    model = make_ours(name)
    args, told = inputs(model.config)
    with torch.no_grad():
        expected = model(*args, **told)
        prompt = model.given(args[2], **told)
        assert torch.equal(prompt(*args[:2]), expected)
        assert torch.equal(prompt(args[0], conditioning=model.conditioning(args[1], **told)), expected)
        run = prompt.conditioning(args[1]).unflatten(0, (len(args[1]), -1))  # of each step, the rows of all samples
        for t, rows in zip(args[1], run, strict=True):
            expected = model(args[0], t, args[2], **told)
            given = model(args[0], conditioning=rows.expand(len(args[0]), -1), prompts=prompt.prompts)
            assert (given - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "x4 upscaler", "LCM"])
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_are_shared_out_to_the_batch(name, rows):
    model = make_ours(name)
    (x, _, text), told = inputs(model.config, rows)
    x, t = torch.cat([x, x + 1])[:4], torch.tensor(321.0)
    spread = {k: v.repeat_interleave(4 // rows, 0) for k, v in told.items()}
    with torch.no_grad():
        expected = model(x, t, text.repeat_interleave(4 // rows, 0), **spread)
        assert (model(x, t, text, **told) - expected).abs().max() <= 1e-5
        assert (model.given(text, **told)(x, t) - expected).abs().max() <= 1e-5


def test_an_empty_batch_stays_empty():
    model = make_ours("SDXL")
    (x, t, text), told = inputs(model.config)
    nothing = {k: v[:0] for k, v in told.items()}
    with torch.no_grad():
        assert model(x[:0], t[:0], text[:0], **nothing).shape == (0, 4, 8, 8)
        assert model.given(text[:1], **{k: v[:1] for k, v in told.items()})(x[:0], t[:0]).shape == (0, 4, 8, 8)


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "LCM"])
def test_a_prompt_of_another_dtype_is_taken_in_that_of_the_weights(name):
    model = make_ours(name).bfloat16()
    args, told = inputs(model.config)
    x, t, _ = given = inputs(model.config, dtype=torch.bfloat16)[0]
    with torch.no_grad():
        expected = model(*given, **told)
        assert torch.equal(model(x, t, args[2], **told), expected)
        assert expected.dtype == torch.bfloat16


def test_samples_with_a_prompt_and_guidance():
    model = make_ours("SDXL")
    (_, _, text), told = inputs(model.config, 2)
    table = diffkern.make_table("ddim", scaled_linear(), 3)
    prompt = model.given(text, **told)
    both = diffkern.sample(prompt, table, 2, guidance=3.0)
    assert both.shape == (2, 4, 8, 8)
    second = diffkern.sample(prompt, table, sample_ids=[1], guidance=3.0)
    assert (second - both[1:]).abs().max() <= 1e-4
    each_step = diffkern.sample(lambda x, t: prompt(x, t), table, 2, shape=(4, 8, 8), guidance=3.0)
    assert (each_step - both).abs().max() <= 1e-4
    alone = model.given(text[1:], **{k: v[1:] for k, v in told.items()})
    plain = diffkern.sample(alone, table, 2)
    assert (diffkern.sample(prompt, table, 2, guidance=1.0) - plain).abs().max() <= 1e-4
    assert (plain - both).abs().max() > 0.01


# As published with the two, keys that choose the sampler included.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "SDXL": {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
        "use_karras_sigmas": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_loads(name, tmp_path):
    model = make_ours(name)
    model.save(tmp_path / "unet", torch.float32)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[name]))
    loaded = diffkern.load(tmp_path)
    assert torch.equal(loaded.schedule.alpha_t, scaled_linear().alpha_t)
    args, told = inputs(model.config)
    assert isinstance(loaded.model, diffkern.UNet2DCondition)
    with torch.no_grad():
        assert torch.equal(loaded.model(*args, **told), model(*args, **told))


def test_the_command_line_says_that_there_is_no_prompt(tmp_path, capsys):
    make_ours("SD 1.5").save(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULERS["SD 1.5"]))
    assert main(["sample", "--model", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert "this model needs encoder_hidden_states, the prompt" in capsys.readouterr().err


def test_what_is_missing_gets_a_sentence():
    model = make_ours("SD 1.5")
    (x, t, text), _ = inputs(model.config)
    for call, message in (
        (lambda: model(x, t), "needs encoder_hidden_states, the prompt: give it, or sample with given"),
        (lambda: model(x, None, text), "needs a timestep, or its conditioning"),
        (lambda: model(x, t, text[..., :7]), r"encoder_hidden_states must be \[B, T, 12\], not \[3, 5, 7\]"),
        (lambda: model(x, t, text, mask=torch.ones(3, 4)), r"the mask must be \[3, 5\] as .* is, not \[3, 4\]"),
        (lambda: model(x, t, text[:2]), "a batch of 3 takes 1 row, 2 for its halves, or 3, not 2"),
        (lambda: model.given(text)(x[:2], t[:2]), "a batch of 2 takes 1 row, 2 for its halves, or 2, not 3"),
        (lambda: model(x, t, text, class_labels=torch.zeros(3).long()), "takes no labels"),
        (lambda: model(x, t, text, text_embeds=torch.zeros(3, 4)), "takes no text_embeds and time_ids"),
        (lambda: model(x, t, text, timestep_cond=torch.zeros(3, 4)), "takes no timestep_cond"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model = make_ours("SDXL")
    (x, t, text), told = inputs(model.config)
    with pytest.raises(ValueError, match="needs text_embeds and time_ids"):
        model(x, t, text, text_embeds=told["text_embeds"])
    with pytest.raises(ValueError, match=r"time_ids \[3, 5\] make 50 numbers, the model takes 58"):
        model(x, t, text, text_embeds=told["text_embeds"], time_ids=told["time_ids"][:, 1:])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel, not a UNet2DConditionModel"),
    "another block": (
        {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]},
        "'SimpleCrossAttnDownBlock2D': allowed here is DownBlock2D, CrossAttnDownBlock2D",
    ),
    "another middle": ({"mid_block_type": "UNetMidBlock2D"}, "allowed here is UNetMidBlock2DCrossAttn, none"),
    "only cross-attention": ({"only_cross_attention": True}, "only_cross_attention True: allowed here is False"),
    "only cross-attention in a level": ({"only_cross_attention": [True, False]}, "this must be bool"),
    "two prompts": ({"dual_cross_attention": True}, "dual_cross_attention True: allowed here is False"),
    "a projected prompt": ({"encoder_hid_dim": 8}, "encoder_hid_dim 8: allowed here is none"),
    "class embeddings": ({"class_embed_type": "projection"}, "class_embed_type 'projection': allowed here is none"),
    "added images": ({"addition_embed_type": "image"}, "addition_embed_type 'image': allowed here is text_time, none"),
    "gated attention": ({"attention_type": "gated"}, "attention_type 'gated': allowed here is default"),
    "a large kernel": ({"conv_in_kernel": 5}, "conv_in_kernel 5: allowed here is 3"),
    "heads that do not divide": ({"attention_head_dim": [2, 5]}, "has 32, .* attention_head_dim 5, does not divide"),
    "heads for other levels": ({"attention_head_dim": [2]}, "not one for each of 2 levels"),
    "no head": ({"attention_head_dim": 0}, "attention_head_dim 0: allowed here is 1 to 1024"),
    "layers in lists": ({"transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block .* must be int"),
    "layers for other levels": ({"layers_per_block": [1, 1, 1]}, "not one for each of 2 levels"),
    "no sizes": (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
        "projection_class_embeddings_input_dim None: allowed here is 1 to 65536",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_gets_a_sentence(tmp_path, name):
    changes, message = WRONG[name]
    make_ours("SD 1.5").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=message):
        UNet2DCondition.from_folder(tmp_path)

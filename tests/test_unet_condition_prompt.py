"""A UNet2DCondition and what it is told: computed once, shared out to the batch, sampled with, and refused if wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from prompted_unets import SCHEDULERS, inputs, make_ours

import diffkern
from diffkern.cli import main
from diffkern.models.folder import ModelError
from diffkern.models.unet_condition import UNet2DCondition
from diffkern.schedules import scaled_linear


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
    copies = [e for e in profile.events() if e.name == "aten::clone" and e.input_shapes and not within_onednn(e)]
    assert not [e.input_shapes for e in copies if len(e.input_shapes[0]) > 2]


def within_onednn(event: Any) -> bool:
    """Whether PyTorch made a copy in a convolution of oneDNN, as 2.11 does of every residual."""
    outer = event.cpu_parent and event.cpu_parent.cpu_parent
    return torch.__version__ < "2.13" and outer is not None and outer.name == "mkldnn::_convolution_pointwise"


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

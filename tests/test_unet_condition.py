"""UNet2DCondition against diffusers' UNet2DConditionModel on the same weights, and the folder format both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from prompted_unets import VARIANTS, inputs
from safetensors.torch import load_file

from diffkern.models.blocks import Picture, Upsample
from diffkern.models.folder import WEIGHTS
from diffkern.models.unet_condition import UNet2DCondition

diffusers = pytest.importorskip("diffusers")


def make_theirs(name: str):
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**VARIANTS[name]).eval()
    for p in model.parameters():  # biases and affine parameters that matter, not diffusers' zeros and ones
        torch.nn.init.normal_(p, std=0.1) if p.dim() < 2 else None
    return model


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
        torch.testing.assert_close(up(Picture(x), torch.Size([size, size])).pixels, expected)

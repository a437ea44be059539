"""On a GPU: whole networks against diffusers, with small random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkern

pytest.importorskip("diffusers")

from diffusers_models import MODELS, make, moved, run

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

OWN: dict[str, Any] = {
    "DDPM": diffkern.UNet2D,
    "SD 1.5": diffkern.UNet2DCondition,
    "SDXL": diffkern.UNet2DCondition,
    "DiT": diffkern.DiT,
}


@pytest.mark.parametrize("name", MODELS)
def test_accelerated_equals_plain(name):
    """In bfloat16 no further from float32 than diffusers, by the root of the mean square."""
    exact = run(make(name).to(DEVICE), name, torch.float32)
    model = make(name).to(DEVICE)
    assert diffkern.accelerate(model).replaced
    assert (run(model, name, torch.float32) - exact).abs().max() <= 1e-4 * exact.std()
    if name == "tiny VAE":  # takes float32 only
        return
    model = make(name, torch.bfloat16).to(DEVICE)
    plain = (run(model, name, torch.bfloat16) - exact).square().mean().sqrt()
    diffkern.accelerate(model)
    assert (run(model, name, torch.bfloat16) - exact).square().mean().sqrt() <= 1.1 * plain


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_own_networks_equal_diffusers(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    args, kwargs = moved(MODELS[name][2](), torch.float32, DEVICE)
    exact = make(name).to(DEVICE)(*args, **kwargs, return_dict=False)[0][:, : args[0].shape[1]]
    given = kwargs.pop("added_cond_kwargs", {})
    ours = OWN[name].from_folder(tmp_path, device=DEVICE)
    assert (ours(*args, **kwargs, **given) - exact).abs().max() <= 1e-4 * exact.std()
    args, kwargs, given = moved((MODELS[name][2]()[0], kwargs, given), torch.bfloat16, DEVICE)
    plain = make(name, torch.bfloat16).to(DEVICE)
    more = {"added_cond_kwargs": given} if given else {}
    theirs = plain(*args, **kwargs, **more, return_dict=False)[0][:, : args[0].shape[1]]
    ours = OWN[name].from_folder(tmp_path, torch.bfloat16, DEVICE)
    error, allowed = ((y - exact).square().mean().sqrt() for y in (ours(*args, **kwargs, **given), theirs))
    assert error <= 1.1 * allowed


@torch.no_grad()
def test_own_vae_equals_diffusers(tmp_path):
    theirs = make("VAE")
    theirs.save_pretrained(tmp_path)
    latents = torch.randn(2, 4, 16, 16, device=DEVICE)
    expected = theirs.to(DEVICE).decode(latents).sample
    got = diffkern.AutoencoderKL.from_folder(tmp_path, device=DEVICE).decode(latents)
    assert (got - expected).abs().max() <= 1e-4 * expected.std()

"""Calls of accelerated networks that are recorded and replayed, on a CPU; what only a GPU shows is in
tests/test_accelerate_graph_gpu.py. What is compared are bits, with the same network without graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerated_graphs import BEFORE, _on_cpu, agree, both, recorded, replays, same, tensors  # noqa: F401 (a fixture)
from graphs import CPURecorder
from torch import Tensor
from torch.utils._pytree import tree_map

import diffkern
from diffkern.graphs import calls, kept

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")

from diffusers_models import MODELS, PROMPT, pixels  # noqa: E402 (after the check for diffusers)
from test_accelerate_pipelines import controlnet, picture  # noqa: E402

NAMES = ["DDPM", "SDXL", "ControlNet", "DiT", "PixArt", "SD 3.5", "Flux with guidance", "Wan", "LTX"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_calls_with_other_numbers(name: str) -> None:
    """Each call has other numbers in all its tensors, and the results of all are right in the end."""
    plain, model = both(name)
    args, kwargs = MODELS[name][2]()
    found = []
    for i in range(BEFORE + 3):
        call_args, call_kwargs = tree_map(lambda t, i=i: _moved(t, i), (args, kwargs))
        found.append((model(*call_args, **call_kwargs), plain(*call_args, **call_kwargs)))
    assert all(same(got, want) for got, want in found)
    assert not any(same(found[0][0], other) for other, _ in found[1:])
    assert (CPURecorder.last.records, CPURecorder.last.replays) == (1, 2)
    # As a tuple is another call.
    got = agree(plain, model, *args, **kwargs, return_dict=False)
    assert type(got) is tuple
    assert CPURecorder.last.records == 2


def _moved(value: Any, i: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value + 0.01 * i if value.is_floating_point() else value if value.max() <= 1 else (value + i) % 900


@pytest.mark.parametrize("name", ["VAE", "tiny VAE"])
@torch.no_grad()
def test_encode_and_decode(name: str) -> None:
    plain, model = both(name)
    for i in range(BEFORE + 2):
        image, latents = pixels(3, 32) + 0.1 * i, pixels(4, 8) - 0.1 * i
        if name == "VAE":
            got, want = (m.encode(image).latent_dist.parameters for m in (model, plain))
        else:
            got, want = (m.encode(image).latents for m in (model, plain))
        assert torch.equal(got, want)
        assert same(model.decode(latents), plain.decode(latents))
    assert [recorded(m) for m in (model, model.encoder, model.decoder)] == [0, 1, 1]


@torch.no_grad()
def test_residuals_of_a_controlnet() -> None:
    controls, unets = both("ControlNet"), both("SD 1.5")
    results: list[Any] = [[], []]
    for i in range(BEFORE + 2):
        x, t, image = pixels() + 0.1 * i, torch.tensor(500 - i), pixels(3, 32) - 0.1 * i
        for control, unet, found in zip(controls, unets, results, strict=True):
            down, mid = control(x, t, **PROMPT, controlnet_cond=image, conditioning_scale=0.5, return_dict=False)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            found.append((down, mid, unet(x, t, **PROMPT, **more)))
    for want, got in zip(*results, strict=True):
        assert all(map(same, got, want))
    assert (recorded(controls[1]), recorded(unets[1])) == (1, 1)


@pytest.mark.parametrize("name", ["DDPM", "SD 1.5"])
@torch.no_grad()
def test_a_timestep_that_is_a_number(name: str) -> None:
    plain, model = both(name)
    kwargs = PROMPT if name == "SD 1.5" else {}
    x = pixels(3 if name == "DDPM" else 4)
    kinds: list[Any] = [int, lambda i: i + 0.5, lambda i: torch.tensor(i), lambda i: torch.tensor(i / 3)]
    for kind in kinds:
        for i in range(10, 12 + BEFORE):
            assert same(model(x, kind(i), **kwargs), plain(x, kind(i), **kwargs))
    # One that is a number is told apart by its dtype alone, and a UNet2DModel makes whole numbers of all.
    assert recorded(model) == (2 if name == "DDPM" else 3)
    agree(plain, model, x, timestep=11, **kwargs)
    assert recorded(model) == (3 if name == "DDPM" else 4)


def test_a_pipeline() -> None:
    (plain, call), (pipe, _) = controlnet(), controlnet()
    for each, option in ((plain, False), (pipe, "auto")):
        each.scheduler = diffusers.DDIMScheduler()
        diffkern.accelerate(each, cuda_graph=option)
    call = {**call, "num_inference_steps": 4}
    changed = {**call, "prompt_embeds": 0.5 * call["prompt_embeds"]}
    for arguments, replayed in ((call, 0), (changed, 4), ({**call, "num_images_per_prompt": 2}, 4)):
        assert np.array_equal(picture(pipe, arguments), picture(plain, arguments))
        assert (replays(pipe.unet), replays(pipe.controlnet)) == (replayed, replayed)
    assert (recorded(pipe.unet), recorded(pipe.controlnet)) == (2, 2)


def test_a_changed_batch_is_another_graph_and_few_are_kept(on_cpu) -> None:
    on_cpu.setattr(calls, "LIMIT", 3)
    on_cpu.setattr(kept, "LIMIT", 3)
    on_cpu.setattr(calls, "BEFORE_FULL", 5)
    plain, model = both("DDPM")
    for n in (1, 2, 3, 4):
        agree(plain, model, torch.ones(n, 3, 16, 16), 7)
    assert (recorded(model), CPURecorder.last.records) == (3, 3)
    agree(plain, model, torch.ones(4, 3, 16, 16), 7, times=3)  # now it came often enough to take another's place
    assert (recorded(model), CPURecorder.last.records) == (3, 4)
    agree(plain, model, torch.ones(2, 3, 16, 16), 7, times=1)
    assert CPURecorder.last.records == 4


def test_what_tells_calls_apart() -> None:
    plain, model = both("DDPM")
    x, t = pixels(3), torch.tensor([500])
    agree(plain, model, x, t.expand(2))  # two entries in one place
    agree(plain, model, x.to(memory_format=torch.channels_last), t.expand(2))
    agree(plain, model, x, t.float())
    agree(plain, model, x[:1].expand(2, -1, -1, -1), timestep=t)
    assert recorded(model) == 4
    with diffkern.use_backend("reference"):
        agree(plain, model, x, t.expand(2))
    with diffkern.batch_invariant():
        agree(plain, model, x, t.expand(2))
    assert recorded(model) == 6

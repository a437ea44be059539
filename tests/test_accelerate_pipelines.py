"""Whole pipelines, accelerated against plain: the same picture from the same seed, in every kind of pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import diffkern
from diffkern.integrations.diffusers import fuse_scheduler
from diffkern.integrations.report import Replaced
from diffkern.models.bundle import ASSETS

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")  # without it diffusers has no pipelines with a prompt

from diffusers_models import make, randn  # noqa: E402 (after the check for diffusers)

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PICTURE, MASK = randn(1, 3, 32, 32).clamp(-1, 1), torch.zeros(1, 1, 32, 32)
MASK[..., 8:24, 4:20] = 1
NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
UNSAFE: dict[str, Any] = {
    **NO_TEXT,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
PROMPTS: dict[str, Any] = {
    "prompt_embeds": randn(1, 7, 32, seed=2), "negative_prompt_embeds": randn(1, 7, 32, seed=3),
}  # fmt: skip
XL: dict[str, Any] = {
    "pooled_prompt_embeds": randn(1, 32, seed=4), "negative_pooled_prompt_embeds": randn(1, 32, seed=5),
}  # fmt: skip


def ddim() -> Any:
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def text_to_image() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionPipeline(vae=make("VAE"), unet=make("SD 1.5"), scheduler=ddim(), **UNSAFE)
    return pipe, {**PROMPTS, "height": 32, "width": 32, "num_inference_steps": 6}


def xl() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=make("VAE"), unet=make("SDXL"), scheduler=diffusers.EulerDiscreteScheduler(**BETAS), **NO_TEXT,
        text_encoder_2=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    return pipe, {**PROMPTS, **XL, "height": 32, "width": 32, "num_inference_steps": 6}


def image_to_image() -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(vae=make("VAE"), unet=make("SD 1.5"), scheduler=scheduler, **UNSAFE)
    return pipe, {**PROMPTS, "image": PICTURE, "strength": 0.7, "num_inference_steps": 8}


def inpaint() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionInpaintPipeline(
        vae=make("VAE"), unet=make("SD 1.5"), scheduler=diffusers.UniPCMultistepScheduler(**BETAS), **UNSAFE
    )
    return pipe, {**PROMPTS, "image": PICTURE, "mask_image": MASK, "height": 32, "width": 32, "num_inference_steps": 6}


def controlnet() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae=make("VAE"), unet=make("SD 1.5"), controlnet=make("ControlNet"), scheduler=diffusers.PNDMScheduler(**BETAS),
        **UNSAFE,
    )  # fmt: skip
    return pipe, {**PROMPTS, "image": PICTURE * 0.5 + 0.5, "num_inference_steps": 6}


def class_conditional() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.DiTPipeline(transformer=make("DiT"), vae=make("VAE"), scheduler=diffusers.DDIMScheduler(**BETAS))
    return pipe, {"class_labels": [3, 7], "num_inference_steps": 6}


def flow(name: str, transformer: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of SD 3 or FLUX, without its text encoders, and a call of it."""
    vae = make("VAE")
    vae.register_to_config(shift_factor=0.1)
    parts: dict[str, Any] = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None, "vae": vae}
    pipe = getattr(diffusers, name)(
        transformer=make(transformer), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **parts,
        **({"text_encoder_3": None, "tokenizer_3": None} if name.startswith("Stable") else {}),
    )  # fmt: skip
    embeds = {"prompt_embeds": PROMPTS["prompt_embeds"], "pooled_prompt_embeds": randn(1, 24, seed=4)}
    return pipe, {**embeds, "height": 16, "width": 16, "num_inference_steps": 6}


def sd3() -> tuple[Any, dict[str, Any]]:
    pipe, call = flow("StableDiffusion3Pipeline", "SD 3.5")
    negative = PROMPTS["negative_prompt_embeds"], randn(1, 24, seed=5)
    return pipe, call | dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), negative, strict=True))


def flux() -> tuple[Any, dict[str, Any]]:
    return flow("FluxPipeline", "Flux with guidance")


def unconditional() -> tuple[Any, dict[str, Any]]:
    return diffusers.DDIMPipeline(unet=make("DDPM"), scheduler=diffusers.DDIMScheduler()), {"num_inference_steps": 6}


PIPELINES: list[Callable[[], tuple[Any, dict[str, Any]]]] = [
    text_to_image, xl, image_to_image, inpaint, controlnet, class_conditional, sd3, flux, unconditional,
]  # fmt: skip


def picture(pipe: Any, call: dict[str, Any]) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.mark.parametrize("build", PIPELINES)
def test_float32_picture_equals_plain(build: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    pipe, call = build()
    want, scheduler = picture(pipe, call), pipe.scheduler
    before = (type(scheduler), dict(vars(scheduler)).keys())
    report = diffkern.accelerate(pipe)
    assert Replaced(type(scheduler).__name__, 1, ("sampler_step",)) in report.replaced
    delta = np.abs(picture(pipe, call) - want).max()
    assert 0 < delta <= 1e-4
    diffkern.restore(pipe)
    assert pipe.scheduler is scheduler
    assert (type(scheduler), dict(vars(scheduler)).keys()) == before
    assert np.array_equal(picture(pipe, call), want)


@pytest.mark.parametrize("build", PIPELINES[:-1])  # diffusers' unconditional ones cannot hand out bfloat16
def test_bfloat16_picture_is_as_near_as_plain(build: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    pipe, call = build()
    exact = picture(pipe, call)
    pipe.to(torch.bfloat16)
    call = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    plain = np.square(picture(pipe, call) - exact).mean() ** 0.5
    diffkern.accelerate(pipe)
    ours = np.square(picture(pipe, call) - exact).mean() ** 0.5
    assert 0 < ours <= 1.1 * plain


def test_scheduler_is_left_when_asked() -> None:
    pipe, call = unconditional()
    want, cls = picture(pipe, call), type(pipe.scheduler)
    diffkern.accelerate(pipe, schedulers=False)
    assert type(pipe.scheduler) is cls
    assert np.abs(picture(pipe, call) - want).max() <= 1e-4


def test_scheduler_that_cannot_be_fused_is_said() -> None:
    pipe, call = unconditional()
    pipe.scheduler = diffusers.DDIMScheduler(thresholding=True)
    want = picture(pipe, call)
    report = diffkern.accelerate(pipe)
    assert [(e.name, "thresholding" in e.reason) for e in report.missed] == [("DDIMScheduler", True)]
    assert np.abs(picture(pipe, call) - want).max() <= 1e-4
    with pytest.raises(ValueError, match="1 DDIMScheduler"):
        diffkern.accelerate(pipe, strict=True)


def test_emoji_by_diffusers_is_the_grid_of_diffkern() -> None:
    """The bundled model, loaded by diffusers and accelerated: the pictures that diffkern samples."""
    steps, labels = 10, [0, 3, 8]
    emoji = diffkern.load("emoji-32")
    table = diffkern.make_table("dpmpp_2m", emoji.schedule, steps, spacing="trailing", clip=float("inf"))
    want = diffkern.sample(emoji.model, table, 3, labels=labels, progress=False)
    model = diffusers.UNet2DModel.from_pretrained(ASSETS / "emoji-32")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        diffusers.DDPMScheduler.load_config(ASSETS / "emoji-32"), timestep_spacing="trailing", final_sigmas_type="zero"
    )
    diffkern.accelerate(model, strict=True)
    scheduler = fuse_scheduler(scheduler)
    scheduler.set_timesteps(steps)
    x = diffkern.randn(diffkern.noise_keys(0, 3), [3, 32, 32])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, torch.tensor(labels)).sample, t, x).prev_sample
    assert float((x - want).abs().max()) <= 1e-3 * float(want.std())

"""The networks that are timed, as a diffusers user has them and as diffkern does, from one folder with random weights.

The configs are those of the published models: google/ddpm-cifar10-32, facebook/DiT (small, of the paper), the UNet and
the VAE of Stable Diffusion 1.5. emoji-32 comes with the package.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import diffkern
from diffkern.models.bundle import ASSETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}
"""What the root mean square of a result's difference from that of diffusers in float32 may be, as a share of the
result's standard deviation. In bfloat16 that of diffusers itself is 0.01 (a UNet, DiT-S) to 0.024 (the VAE, which has
the most layers; 20 steps of emoji-32, with guidance); a residual block that is left out makes 0.1 in DiT-S. In float32
another order of sums makes 2e-6, and a projection without its bias 3e-4. The largest difference says little: in a whole
run single pixels turn out otherwise."""

Run = Callable[[], Tensor]
Prepare = Callable[[Any], Any]  # what is done to a diffusers model once it is loaded
Change = Callable[[nn.Module], Any]  # what is called in its place


CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DIT: dict[str, Any] = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "num_layers": 12,
    "out_channels": 8,
    "sample_size": 32,
}
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


class Network(NamedTuple):
    """what: one run of it, in words. make: writes its folder. ours, theirs: a run, from the folder and a dtype; theirs
    as one of the ways below prepares it."""

    what: str
    make: Callable[[Path], None]
    ours: Callable[[Path, torch.dtype], Run]
    theirs: Callable[[Path, torch.dtype, Prepare, Change], Run]


Make = Callable[[Network, Path, torch.dtype], Run]
"""A form of a network: makes a run of it, from the folder of its weights."""


def deltas(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far a result is from the expected one, as shares of that one's standard deviation, for a record."""
    delta = (found.float() - expected) / expected.std()
    return {
        "max delta": float(f"{delta.abs().max().item():.2g}"),
        "rms delta": float(f"{delta.square().mean().sqrt().item():.2g}"),
    }


def wrong(delta: dict[str, float], dtype: str) -> str:
    """Why a result so far from the expected one is not timed, or nothing."""
    if delta["rms delta"] <= BOUNDS[dtype]:  # not where it is NaN
        return ""
    return f"another result: the rms of its difference is {delta['rms delta']:.2g} of the std, {BOUNDS[dtype]:g} may be"


def by_diffusers(prepare: Prepare, change: Change = lambda model: model) -> Make:
    """What diffusers makes of it, from a model that is prepared so, with another call in its place."""
    return lambda network, folder, dtype: network.theirs(folder, dtype, prepare, change)


def as_loaded(model: Any) -> Any:
    return model


def channels_last(model: Any) -> Any:
    return model.to(memory_format=torch.channels_last)


def accelerated(model: Any) -> Any:
    diffkern.accelerate(model)
    return model


# Variants share what they can: several copies of a large network would not fit into memory.
@functools.cache
def _load(kind: str, folder: str, dtype: torch.dtype, prepare: Prepare) -> Any:
    import diffusers

    return prepare(getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype).eval())


@functools.cache
def _load_ours(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    return _OURS[kind].from_folder(folder, dtype)


def _random(kind: str, config: dict[str, Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, kind).from_config(config)
        for p in model.parameters():  # DiT starts with gates of zero, which would leave its blocks without effect
            if p.dim() > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
        model.save_pretrained(folder)

    return make


def network(what: str, kind: str, config: dict[str, Any], inputs: Callable[[], tuple[Tensor, ...]],
             method: str = "forward") -> Network:  # fmt: skip
    """A call of one network. inputs: made of float32 and integers."""

    def given(dtype: torch.dtype) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs())

    def ours(folder: Path, dtype: torch.dtype) -> Run:
        call, args = getattr(_load_ours(kind, folder, dtype), method), given(dtype)
        return lambda: call(*args)

    def theirs(folder: Path, dtype: torch.dtype, prepare: Prepare, change: Change) -> Run:
        call, args = change(First(_load(kind, str(folder), dtype, prepare), method)), given(dtype)
        return lambda: call(*args)

    return Network(what, _random(kind, config), ours, theirs)


class First(nn.Module):
    """A diffusers model with its result in the open."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.eval()

    def forward(self, *args: Tensor, **named: Any) -> Tensor:
        result: Tensor = getattr(self.model, self.method)(*args, **named, return_dict=False)[0]
        return result[:, : args[0].shape[1]] if self.method == "forward" else result  # without a learned variance


_OURS: dict[str, Any] = {
    "UNet2DModel": diffkern.UNet2D,
    "DiTTransformer2DModel": diffkern.DiT,
    "UNet2DConditionModel": diffkern.UNet2DCondition,
    "AutoencoderKL": diffkern.AutoencoderKL,
}


class Emoji:
    """Pictures of the bundled model: DPM-Solver++ 2M with guidance."""

    N, STEPS, GUIDANCE = 36, 20, 3.0

    @classmethod
    def ours(cls, folder: Path, dtype: torch.dtype, device: str = "cpu", **more: Any) -> Run:
        diffusion = diffkern.load("emoji-32", dtype=dtype, device=device)
        # diffusers' scheduler cannot clip x0 as the bundled model's schedule asks, so nobody does here
        table = diffkern.make_table("dpmpp_2m", diffusion.schedule, cls.STEPS, spacing="trailing", clip=math.inf)
        labels = [i % len(diffusion.labels) for i in range(cls.N)]
        options: dict[str, Any] = {"labels": labels, "guidance": cls.GUIDANCE, "batch_size": cls.N, "progress": False}
        options |= more
        return lambda: diffkern.sample(diffusion.model, table, cls.N, **options)

    @classmethod
    def theirs(cls, folder: Path, dtype: torch.dtype, prepare: Prepare, change: Change, device: str = "cpu") -> Run:
        """The loop that a diffusers user writes, with the same initial noise."""
        import diffusers

        source = str(ASSETS / "emoji-32")
        model = _load("UNet2DModel", source, dtype, prepare).to(device)
        layout = torch.channels_last if prepare is channels_last else torch.contiguous_format
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            diffusers.DDPMScheduler.load_config(source), timestep_spacing="trailing", final_sigmas_type="zero"
        )
        null = model.config.num_class_embeds - 1
        labels = torch.tensor([null] * cls.N + [i % null for i in range(cls.N)], device=device)
        noise = diffkern.randn(diffkern.noise_keys(0, cls.N, device), [3, 32, 32])
        forward = change(First(model, "forward"))

        def run() -> Tensor:
            scheduler.set_timesteps(cls.STEPS, device=device)
            x = noise
            for t in scheduler.timesteps:
                both = torch.cat([x, x]).to(dtype).contiguous(memory_format=layout)
                m_u, m_c = forward(both, t.expand(len(both)), labels).chunk(2)
                x = scheduler.step((m_u + cls.GUIDANCE * (m_c - m_u)).float(), t, x).prev_sample
            return x

        return run


NETWORKS: dict[str, Network] = {
    "cifar": network(
        "CIFAR-10 DDPM UNet, 8 pictures of 32 x 32, one call",
        "UNet2DModel",
        CIFAR,
        lambda: (torch.randn(8, 3, 32, 32), torch.arange(8) * 100),
    ),
    "dit": network(
        "DiT-S/2, 4 latents of 32 x 32, one call",
        "DiTTransformer2DModel",
        DIT,
        lambda: (torch.randn(4, 4, 32, 32), torch.arange(4) * 100, torch.arange(4)),
    ),
    "sd15": network(
        "Stable Diffusion 1.5 UNet, 2 latents of 64 x 64, 77 tokens, one call",
        "UNet2DConditionModel",
        SD15,
        lambda: (torch.randn(2, 4, 64, 64), torch.tensor([500, 500]), torch.randn(2, 77, 768)),
    ),
    "vae": network(
        "Stable Diffusion 1.5 VAE, a latent of 64 x 64 decoded, one call",
        "AutoencoderKL",
        VAE,
        lambda: (torch.randn(1, 4, 64, 64),),
        "decode",
    ),
    "emoji": Network(
        f"emoji-32, {Emoji.N} pictures of 32 x 32, guidance, {Emoji.STEPS} steps of DPM-Solver++ 2M",
        lambda folder: None,
        Emoji.ours,
        Emoji.theirs,
    ),
}

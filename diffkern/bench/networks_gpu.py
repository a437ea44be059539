"""The networks that are timed on a GPU, in bfloat16, with random weights made on it: SD 1.5, SDXL, DiT-XL/2, the UNet
of DDPM and the VAE as diffusers and as diffkern have them, and whole runs of emoji-32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import diffkern
from diffkern.bench.networks import (
    CIFAR,
    SD15,
    VAE,
    Change,
    Emoji,
    First,
    Prepare,
    Run,
    accelerated,
    as_loaded,
    channels_last,
)
from diffkern.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from diffkern.models.dit import DiT, DiTConfig
from diffkern.models.folder import lay_out
from diffkern.models.unet import UNet2D, UNet2DConfig
from diffkern.models.unet_condition import UNet2DCondition, UNet2DConditionConfig

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIT_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8, "sample_size": 32}
_TWO_LEVELS = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
# What makes each small, to see whether this script runs.
TINY: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **_TWO_LEVELS,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "UNet2DConditionModel": {
        **_TWO_LEVELS,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
    },
    "DiTTransformer2DModel": {"num_layers": 2},
    "AutoencoderKL": {
        **_TWO_LEVELS,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
}
OURS: dict[str, tuple[Any, Any]] = {
    "UNet2DModel": (UNet2D, UNet2DConfig),
    "UNet2DConditionModel": (UNet2DCondition, UNet2DConditionConfig),
    "DiTTransformer2DModel": (DiT, DiTConfig),
    "AutoencoderKL": (AutoencoderKL, AutoencoderKLConfig),
}


def without_graphs(model: Any) -> Any:
    diffkern.accelerate(model, cuda_graph=False)
    return model


LIBRARY_PRODUCTS = {"max_autotune_gemm_backends": "ATEN", "max_autotune_conv_backends": "ATEN"}
# In the order in which they are compiled, as far as there is time.
COMPILED = ("torch.compile", "torch.compile, max-autotune, library products", "torch.compile, max-autotune")
RECORDED = "diffusers, accelerated, recorded"
"""As `diffkern.accelerate` leaves it to a user, which records a graph of a call by itself."""
THEIRS: dict[str, Prepare] = {
    "diffusers": as_loaded,
    "diffusers, channels_last": channels_last,
    "diffusers, accelerated": without_graphs,
    RECORDED: accelerated,
    **dict.fromkeys(COMPILED, channels_last),
}
RIVALS = {"compile": COMPILED, "diffusers": tuple(name for name in THEIRS if name not in COMPILED)}


class OnGpu(NamedTuple):
    """A call of a network. inputs: made of float32 and integers; told: those with names, as our network takes them, and
    as diffusers' does."""

    what: str
    kind: str
    config: dict[str, Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    told: Callable[[], dict[str, Tensor]] = dict
    method: str = "forward"


def latents(batch: int, size: int, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, size, size)


def vae(pixels: int) -> OnGpu:
    what = f"Stable Diffusion 1.5 VAE, a latent of {pixels // 8} x {pixels // 8} decoded, one call"
    return OnGpu(what, "AutoencoderKL", VAE, lambda: (latents(1, pixels // 8),), method="decode")


def cifar(batch: int) -> OnGpu:
    what = f"CIFAR-10 DDPM UNet, {batch} picture{'s' if batch > 1 else ''} of 32 x 32, one call"
    return OnGpu(what, "UNet2DModel", CIFAR, lambda: (latents(batch, 32, 3), torch.arange(batch) * 15))


NETWORKS: dict[str, OnGpu | None] = {
    "emoji": None,  # a whole run
    "cifar-1": cifar(1),
    "cifar-64": cifar(64),
    "sd15": OnGpu(
        "Stable Diffusion 1.5 UNet, 2 latents of 64 x 64, 77 tokens, one call",
        "UNet2DConditionModel",
        SD15,
        lambda: (latents(2, 64), torch.tensor([500, 500]), torch.randn(2, 77, 768)),
    ),
    "dit-xl": OnGpu(
        "DiT-XL/2, 8 latents of 32 x 32, one call",
        "DiTTransformer2DModel",
        DIT_XL,
        lambda: (latents(8, 32), torch.arange(8) * 100, torch.arange(8)),
    ),
    "vae-512": vae(512),
    "sdxl": OnGpu(
        "SDXL UNet, 2 latents of 128 x 128, 77 tokens, one call",
        "UNet2DConditionModel",
        SDXL,
        lambda: (latents(2, 128), torch.tensor([500, 500]), torch.randn(2, 77, 2048)),
        lambda: {"text_embeds": torch.randn(2, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)},
    ),
    "vae-1024": vae(1024),
}


def change(variant: str) -> Change:
    """What is called in place of a model."""
    options: dict[str, Any] = {} if variant == "torch.compile" else torch._inductor.list_mode_options("max-autotune")
    if variant.endswith("library products"):
        options = options | LIBRARY_PRODUCTS
    return lambda model: torch.compile(model, options=options) if variant in COMPILED else model


class Built:
    """A network on a device, as diffusers has it in bfloat16, and its inputs: what all forms of it are made from."""

    def __init__(self, network: OnGpu, device: str, tiny: bool) -> None:
        import diffusers

        self.network, self.device = network, device
        config = network.config | (TINY[network.kind] if tiny else {})
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(diffusers, network.kind).from_config(config).eval()
        for p in model.parameters():  # what starts as zeros, such as DiT's gates, would leave its block without effect
            if p.dim() > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
        self.model = model.to(device, torch.bfloat16)
        del model, p
        if device == "cuda":
            torch.cuda.empty_cache()  # other processes need what float32 took
        torch.manual_seed(1)
        inputs, told = network.inputs(), network.told()
        if tiny:
            inputs = tuple(t[..., :16, :16] if t.dim() == 4 else t for t in inputs)
        self.inputs = tuple(t.to(device) for t in inputs)
        self.told = {k: t.to(device) for k, t in told.items()}

    def weights(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def given(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        return tuple(map(cast, self.inputs)), {k: cast(t) for k, t in self.told.items()}

    def theirs(self, variant: str, dtype: torch.dtype = torch.bfloat16) -> Run:
        alone = variant == "diffusers" and dtype == torch.bfloat16
        model = self.model if alone else THEIRS[variant](copy.deepcopy(self.model).to(dtype))
        args, told = self.given(dtype)
        named = {"added_cond_kwargs": told} if told else {}
        call = change(variant)(First(model, self.network.method))
        return lambda: call(*args, **named)

    def ours(self) -> Run:
        cls, config = OURS[self.network.kind]
        with torch.device("meta"):
            model = cls(config.from_dict(dict(self.model.config)))
        model.load_state_dict(self.model.state_dict(), assign=True)
        call = getattr(lay_out(model, self.device).eval(), self.network.method)
        args, told = self.given(torch.bfloat16)
        return lambda: call(*args, **told)

    def run(self, variant: str) -> Run:
        return self.ours() if variant == "diffkern" else self.theirs(variant)


class BuiltEmoji:
    """A whole run of the bundled model. "diffkern, graphed" is what `diffkern.sample` does by itself on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def weights(self) -> int:
        model = diffkern.load("emoji-32", dtype=torch.bfloat16).model
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def theirs(self, variant: str, dtype: torch.dtype = torch.bfloat16) -> Run:
        return Emoji.theirs(Path(), dtype, THEIRS[variant], change(variant), self.device)

    def run(self, variant: str) -> Run:
        if variant in THEIRS:
            return self.theirs(variant)
        return Emoji.ours(Path(), torch.bfloat16, self.device, cuda_graph=variant == "diffkern, graphed")


def build(name: str, device: str, tiny: bool) -> Built | BuiltEmoji:
    network = NETWORKS[name]
    return BuiltEmoji(device) if network is None else Built(network, device, tiny)

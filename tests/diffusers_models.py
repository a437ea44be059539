"""Tiny diffusers models with random weights, shaped as the named ones are, and a call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffkern

UNET: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip
SD1: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2, "cross_attention_dim": 32,
}  # fmt: skip
SDXL: dict[str, Any] = {
    **SD1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "in_channels": 4,
    "out_channels": 8, "num_embeds_ada_norm": 1000,
}  # fmt: skip
PIXART: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 32,
    "caption_channels": 12, "use_additional_conditions": False,
}  # fmt: skip

SD3: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 18, "in_channels": 4, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 16,
}  # fmt: skip
LTX: dict[str, Any] = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "num_layers": 2, "caption_channels": 12,
}  # fmt: skip


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(channels: int = 4, size: int = 16) -> Tensor:
    return randn(2, channels, size, size)


def times() -> Tensor:
    return torch.tensor([500, 20])


PROMPT = {"encoder_hidden_states": randn(2, 7, 32, seed=2)}
TEXT_TIME = {"added_cond_kwargs": {"text_embeds": randn(2, 32, seed=3), "time_ids": 64 * randn(2, 6, seed=4)}}
MASK = {"encoder_attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])}


def joint(**more: Any) -> dict[str, Any]:
    return PROMPT | {"timestep": times(), "pooled_projections": randn(2, 24, seed=3), **more}


def flux(**more: Any) -> dict[str, Any]:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(3.0))
    return joint(timestep=times() / 1000, img_ids=grid, txt_ids=torch.zeros(7, 3), **more)


# By name: the class in diffusers, its config, and the arguments of a call.
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "DDPM": ("UNet2DModel", UNET, lambda: ((pixels(3), times()), {})),
    "scale and shift, resampling blocks": (
        "UNet2DModel",
        {**UNET, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5, "downsample_type": "resnet",
         "upsample_type": "resnet"},
        lambda: ((pixels(3), times()), {"class_labels": torch.tensor([1, 4])}),
    ),
    "padding of the DDPM weights, an odd size": (
        "UNet2DModel",
        {**UNET, "downsample_padding": 0, "dropout": 0.3},
        lambda: ((randn(2, 3, 18, 14), times()), {}),
    ),
    "SD 1.5": ("UNet2DConditionModel", SD1, lambda: ((pixels(), times()), PROMPT)),
    "SD 1.5, a masked prompt": ("UNet2DConditionModel", SD1, lambda: ((pixels(), times()), PROMPT | MASK)),
    "SD 2": (
        "UNet2DConditionModel",
        {**SD1, "use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)},
        lambda: ((pixels(size=14), times()), PROMPT),
    ),
    "SDXL": ("UNet2DConditionModel", SDXL, lambda: ((pixels(), times()), PROMPT | TEXT_TIME)),
    "added keys, as in unCLIP and IF": (
        "UNet2DConditionModel",
        {**SD1, "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
         "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
         "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "attention_head_dim": 8, "act_fn": "silu"},
        lambda: ((pixels(), times()), PROMPT),
    ),
    "only attention to the prompt": (
        "UNet2DConditionModel",
        {**SD1, "only_cross_attention": True},
        lambda: ((pixels(), times()), PROMPT),
    ),
    "ControlNet": (
        "ControlNetModel",
        {**{k: v for k, v in SD1.items() if k not in ("sample_size", "up_block_types")},
         "conditioning_embedding_out_channels": (8, 16)},
        lambda: ((pixels(), times()), PROMPT | {"controlnet_cond": pixels(3, 32)}),
    ),
    "VAE": ("AutoencoderKL", VAE, lambda: ((pixels(3, 32),), {})),
    "VAE without attention": (
        "AutoencoderKL",
        {**VAE, "mid_block_add_attention": False},
        lambda: ((pixels(3, 32),), {}),
    ),
    "tiny VAE": (
        "AutoencoderTiny",
        {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
        lambda: ((pixels(4, 8),), {}),
    ),
    "DiT": ("DiTTransformer2DModel", DIT, lambda: ((pixels(size=8), times(), torch.tensor([3, 7])), {})),
    "PixArt": (
        "PixArtTransformer2DModel",
        PIXART,
        lambda: (
            (pixels(size=8),),
            MASK | {"encoder_hidden_states": randn(2, 7, 12), "timestep": times(),
                    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        ),
    ),
    "SD 3": ("SD3Transformer2DModel", SD3, lambda: ((pixels(size=8),), joint())),
    "SD 3.5": (
        "SD3Transformer2DModel",
        {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        lambda: ((pixels(size=8),), joint()),
    ),
    "ControlNet of SD 3.5, without a prompt": (
        "SD3ControlNetModel",
        {**SD3, "joint_attention_dim": None, "use_pos_embed": False},
        lambda: ((randn(2, 16, 32),), {"timestep": times(), "pooled_projections": randn(2, 24, seed=3),
                                       "controlnet_cond": pixels(size=8)}),
    ),
    "Flux": ("FluxTransformer2DModel", FLUX, lambda: ((randn(2, 12, 16),), flux())),
    "Flux with guidance": (
        "FluxTransformer2DModel",
        {**FLUX, "guidance_embeds": True},
        lambda: ((randn(2, 12, 16),), flux(guidance=torch.tensor([3.5, 4.0]))),
    ),
    "Wan": (
        "WanTransformer3DModel",
        {**WAN, "cross_attn_norm": True},
        lambda: ((randn(2, 4, 2, 6, 8),), {"timestep": times(), "encoder_hidden_states": randn(2, 7, 12)}),
    ),
    "Wan, a prompt that is not normalised": (
        "WanTransformer3DModel",
        {**WAN, "cross_attn_norm": False},
        lambda: ((randn(2, 4, 2, 6, 8),), {"timestep": times(), "encoder_hidden_states": randn(2, 7, 12)}),
    ),
    "Wan from a picture": (
        "WanTransformer3DModel",
        {**WAN, "image_dim": 10, "added_kv_proj_dim": 36},
        lambda: (
            (randn(2, 4, 2, 6, 8),),
            {"timestep": times(), "encoder_hidden_states": randn(2, 512, 12),
             "encoder_hidden_states_image": randn(2, 5, 10)},
        ),
    ),
    "LTX": (
        "LTXVideoTransformer3DModel",
        LTX,
        lambda: (
            (randn(2, 12, 8),),
            MASK | {"encoder_hidden_states": randn(2, 7, 12), "timestep": times(), "num_frames": 2, "height": 2,
                    "width": 3},
        ),
    ),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model, the same for the same name, in eval mode."""
    import diffusers

    cls, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, cls)(**config).eval()
    for parameter in model.parameters():  # what is born as zeros, such as gates and a ControlNet's ends, counts as well
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def accelerated(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = make(name, dtype)
    diffkern.accelerate(model)
    return model


def delta(got: Tensor, want: Tensor) -> float:
    """The largest difference, in units of the spread."""
    return float((got - want).abs().max() / want.std())


@torch.no_grad()
def run(model: Any, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """All that a call returns, in one row, float64, on the device of the model."""
    device = next(p.device for p in model.parameters() if not p.is_meta)  # as weights that are offloaded are
    args, kwargs = moved(MODELS[name][2](), dtype, device)
    # On its way through, a tiny VAE rounds what it encodes to 8 bits, and takes float32 only.
    call = model.decode if name == "tiny VAE" else model
    out = call(*args, **kwargs, return_dict=False)
    flat: list[Tensor] = []
    for entry in out:
        flat.extend(entry if isinstance(entry, (tuple, list)) else [entry])
    return torch.cat([t.flatten().double() for t in flat])


def moved(value: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A call's arguments: what is a float in that dtype, all on that device."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple):
        return tuple(moved(v, dtype, device) for v in value)
    return {k: moved(v, dtype, device) for k, v in value.items()} if isinstance(value, dict) else value

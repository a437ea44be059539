"""UNets of Stable Diffusion, small and with random weights, and what they are told."""

from __future__ import annotations

from typing import Any

import torch

from diffkern.models.unet_condition import UNet2DCondition, UNet2DConditionConfig

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


def make_ours(name: str) -> UNet2DCondition:
    torch.manual_seed(0)
    return UNet2DCondition(UNet2DConditionConfig.from_dict(VARIANTS[name])).eval()


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

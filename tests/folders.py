"""A small model folder with random weights, for tests of what reads one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from diffkern.models.unet import UNet2D, UNet2DConfig

LABELS = ["Smileys & Emotion", "Food & Drink", "Flags"]
CONFIG = UNet2DConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    num_class_embeds=4,
)
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


def write_tiny(path: Path) -> Path:
    """Write a class-conditional 8x8 model whose last class is the null label. Returns the folder."""
    torch.manual_seed(0)
    UNet2D(CONFIG).save(path, torch.float32)
    (path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (path / "labels.json").write_text(json.dumps({"labels": LABELS, "null_label": 3}))
    return path

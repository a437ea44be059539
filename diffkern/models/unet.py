"""The UNet of DDPM (Ho et al. 2020) and its kin: diffusers' `UNet2DModel`, same config, same parameter names, class
conditional included, in ops and channels_last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffkern.models import folder
from diffkern.models.blocks import Attention
from diffkern.models.recorded import recorded
from diffkern.models.unet_base import UNet
from diffkern.models.unet_config import UNetConfig


@dataclass(frozen=True)
class UNet2DConfig(UNetConfig):
    """The keys of a diffusers `UNet2DModel` config that shape the network, with diffusers' defaults."""

    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attention_head_dim: int | None = 8
    attn_norm_num_groups: int | None = None
    add_attention: bool = True
    num_train_timesteps: int | None = None

    CLASS_NAME: ClassVar[str] = "UNet2DModel"
    ALLOWED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **UNetConfig.ALLOWED,
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
    }
    BLOCKS: ClassVar[dict[str, tuple[str, ...]]] = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for channels in self.block_out_channels:
            if channels % (self.attention_head_dim or channels):
                raise folder.ModelError(
                    f"block_out_channels has {channels}, which attention_head_dim {self.attention_head_dim} "
                    "does not divide"
                )


class UNet2D(UNet):
    """A denoiser of pictures: (x [B, C, H, W], timestep [B], class labels [B]) -> [B, out_channels, H, W]."""

    # that a call runs
    OPS = ("timestep_embedding", "conv2d", "group_norm_silu", "linear", "query_key_value", "attention")
    CONFIG = UNet2DConfig

    def attention(self, kind: str, level: int) -> Attention | None:
        c = self.config
        width, groups, scale = c.block_out_channels[level], c.norm_num_groups, 1.0
        if kind == c.mid_block_type:
            groups, scale = c.attn_norm_num_groups or groups, float(c.mid_block_scale_factor)
        attends = c.add_attention if kind == c.mid_block_type else kind.startswith("Attn")
        return Attention(width, c.attention_head_dim or width, groups, c.norm_eps, scale) if attends else None

    def conditioning(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """All that the network is told by timestep [B] and class_labels int64 [B]: the rows that its residual blocks
        add, or scale and shift by, side by side in the order of the blocks. Give a run's timesteps and labels at once,
        and rows of the result to `forward`. Returns [B, sum of the blocks' widths]."""
        return self.rows(self.embedding(timestep, class_labels))

    @recorded
    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        conditioning: Tensor | None = None,
    ) -> Tensor:
        """x: [B, C, H, W]. timestep: [B] or scalar, may be fractional. class_labels: int64 [B], given exactly if the
        model is class-conditional. conditioning: that of the two, instead of them. Returns [B, out_channels, H, W],
        channels_last, dtype of the weights."""
        if conditioning is None:
            if timestep is None:
                raise ValueError("this model needs a timestep, or its conditioning")
            t = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
            conditioning = self.conditioning(t, class_labels)
        return self.through(x, conditioning)

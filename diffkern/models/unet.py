"""The UNet of DDPM (Ho et al. 2020) and its kin: diffusers' `UNet2DModel`, same config, same parameter names, class
conditional included, in ops and channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.models import folder
from diffkern.models.blocks import (
    Attention,
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    convolve,
    norm_silu,
    resnet_blocks,
)
from diffkern.ops.timestep_embedding import timestep_embedding


@dataclass(frozen=True)
class UNet2DConfig:
    """The keys of a diffusers `UNet2DModel` config that shape the network, with diffusers' defaults."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    # What this implementation can do, where diffusers can do more.
    ALLOWED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "time_embedding_type": ("positional",),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "act_fn": ("silu", "swish"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None,),
    }

    def __post_init__(self) -> None:
        for f in fields(self):
            folder.check_type(f.name, getattr(self, f.name), str(f.type))
        for key, allowed in self.ALLOWED.items():
            folder.check_choice(key, getattr(self, key), allowed)
        for key, allowed in (
            ("down_block_types", ("DownBlock2D", "AttnDownBlock2D")),
            ("up_block_types", ("UpBlock2D", "AttnUpBlock2D")),
        ):
            for block in getattr(self, key):
                folder.check_choice(key, block, allowed)
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.block_out_channels):
            raise folder.ModelError("down_block_types, up_block_types and block_out_channels differ in length")
        for key, low, high in (
            ("norm_num_groups", 1, 65536),
            ("layers_per_block", 1, 64),
            ("block_out_channels", 1, 65536),
        ):
            value = getattr(self, key)
            if not all(low <= v <= high for v in (value if isinstance(value, tuple) else (value,))) or value == ():
                raise folder.ModelError(f"config.json has {key} {value!r}: allowed here is {low} to {high}")
        for channels in self.block_out_channels:
            head_dim = self.attention_head_dim or channels
            if channels % self.norm_num_groups or channels % head_dim:
                raise folder.ModelError(
                    f"block_out_channels has {channels}, which norm_num_groups {self.norm_num_groups} "
                    f"or attention_head_dim {head_dim} does not divide"
                )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> UNet2DConfig:
        """Read a diffusers config. Raises ModelError naming a value that this implementation cannot build."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        return cls(**values)


class _Level(nn.Module):
    """One resolution, on the way down or up: residual blocks, attention after each if any, then the resampling."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[Attention]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def layer(self, i: int, x: Tensor, time: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.resnets[i](x, time, skip)
        return self.attentions[i](x) if hasattr(self, "attentions") else x


class _Mid(nn.Module):
    def __init__(self, resnets: list[ResnetBlock], attentions: list[Attention]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)

    def forward(self, x: Tensor, times: Iterator[Tensor]) -> Tensor:
        x = self.resnets[0](x, next(times))
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, next(times))


class UNet2D(nn.Module):
    """A denoiser of pictures: (x [B, C, H, W], timestep [B], class labels [B]) -> [B, out_channels, H, W]."""

    OPS = ("timestep_embedding", "conv2d", "group_norm_silu", "linear", "attention")  # that a call runs

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = c = config
        self.null_label: int | None = None
        channels = c.block_out_channels
        time_dim = c.time_embedding_dim or 4 * channels[0]
        scale_shift = c.resnet_time_scale_shift == "scale_shift"

        def resnet(a: int, b: int, scale: float = 1.0) -> ResnetBlock:
            return ResnetBlock(a, b, time_dim, c.norm_num_groups, c.norm_eps, c.dropout, scale_shift, scale)

        def attention(a: int, groups: int, scale: float = 1.0) -> Attention:
            return Attention(a, c.attention_head_dim or a, groups, c.norm_eps, scale)

        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        self.class_embedding = nn.Embedding(c.num_class_embeds, time_dim) if c.num_class_embeds is not None else None

        self.down_blocks = nn.ModuleList()
        skips, width = [channels[0]], channels[0]
        for i, kind in enumerate(c.down_block_types):
            widths = [width, *[channels[i]] * c.layers_per_block]
            width = channels[i]
            attentions = [attention(width, c.norm_num_groups) for _ in widths[1:] if kind == "AttnDownBlock2D"]
            down = _Level([resnet(a, width) for a in widths[:-1]], attentions)
            skips += widths[1:]
            if i < len(channels) - 1:
                down.downsamplers = nn.ModuleList([Downsample(width, c.downsample_padding)])
                skips.append(width)
            self.down_blocks.append(down)

        self.mid_block: _Mid | None = None
        if c.mid_block_type is not None:
            scale = float(c.mid_block_scale_factor)
            groups = c.attn_norm_num_groups or c.norm_num_groups
            attentions = [attention(width, groups, scale)] if c.add_attention else []
            self.mid_block = _Mid([resnet(width, width, scale) for _ in range(2)], attentions)

        self.up_blocks = nn.ModuleList()
        for i, (kind, out) in enumerate(zip(c.up_block_types, reversed(channels), strict=True)):
            resnets = []
            for _ in range(c.layers_per_block + 1):
                resnets.append(resnet(width + skips.pop(), out))
                width = out
            attentions = [attention(out, c.norm_num_groups) for _ in resnets if kind == "AttnUpBlock2D"]
            up = _Level(resnets, attentions)
            if i < len(channels) - 1:
                up.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(up)

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, channels[0], c.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], c.out_channels, 3, padding=1)
        self.time_widths = [block.time_emb_proj.out_features for block in resnet_blocks(self)]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample, from the config. Raises ModelError if the config does not say."""
        size = self.config.sample_size
        if size is None:
            raise folder.ModelError("the config has no sample_size: give the shape of a sample")
        height, width = (size, size) if isinstance(size, int) else size
        return self.config.in_channels, height, width

    @property
    def num_classes(self) -> int:
        """How many labels there are, a null label included; 0 if the model is not class-conditional."""
        return self.config.num_class_embeds or 0

    def conditioning(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """All that the network is told by timestep [B] and class_labels int64 [B]: the rows that its residual blocks
        add, or scale and shift by, side by side in the order of the blocks. Give a run's timesteps and labels at once,
        and rows of the result to `forward`. Returns [B, sum of the blocks' widths]."""
        if (class_labels is None) != (self.class_embedding is None):
            needs = "needs class labels" if class_labels is None else "is not class-conditional: it takes no labels"
            raise ValueError(f"this model {needs}")
        c = self.config
        sinusoids = timestep_embedding(timestep, self.conv_in.out_channels, c.flip_sin_to_cos, c.freq_shift)
        emb = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype))
        if self.class_embedding is not None and class_labels is not None:
            emb = emb + self.class_embedding(class_labels)
        emb = F.silu(emb)  # every block applies it first: once is enough
        return torch.cat([block.time_emb_proj(emb) for block in resnet_blocks(self)], dim=1)

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
        times = iter(conditioning.split(self.time_widths, dim=1))
        x = x.contiguous(memory_format=torch.channels_last)
        x = convolve(self.conv_in, 2 * x - 1 if self.config.center_input_sample else x)

        skips = [x]
        for down in self._levels(self.down_blocks):
            for i in range(len(down.resnets)):
                x = down.layer(i, x, next(times))
                skips.append(x)
            if down.downsamplers is not None:
                x = down.downsamplers[0](x)
                skips.append(x)
        if self.mid_block is not None:
            x = self.mid_block(x, times)
        for up in self._levels(self.up_blocks):
            for i in range(len(up.resnets)):
                x = up.layer(i, x, next(times), skips.pop())
            if up.upsamplers is not None:
                x = up.upsamplers[0](x)
        return convolve(self.conv_out, norm_silu(self.conv_norm_out, x))

    @staticmethod
    def _levels(blocks: nn.ModuleList) -> Iterator[_Level]:
        return cast("Iterator[_Level]", iter(blocks))

    @classmethod
    def from_folder(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> UNet2D:
        """Read a diffusers `UNet2DModel` folder (config.json and safetensors), ready to sample. Raises ModelError, with
        a sentence that names what is wrong."""
        config = folder.read_config(path, "UNet2DModel")
        with torch.device("meta"):
            model = cls(UNet2DConfig.from_dict(config))
        folder.read_weights(model, path, dtype, device)
        return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder that `from_folder`, and diffusers, read."""
        config = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        folder.write(path, {"_class_name": "UNet2DModel", **config}, self.state_dict(), dtype)

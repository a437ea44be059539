"""What the UNets of diffusers have in common: their folders, and the U itself: levels of residual blocks, each of half
the resolution of the one above, down and up again with skips across (Ho et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.layout import joined, lay_side_by_side
from diffkern.models import folder
from diffkern.models.blocks import (
    Downsample,
    Embedding,
    Picture,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    convolve,
    normalised,
    picture,
    project_side_by_side,
)
from diffkern.models.unet_config import UNetConfig
from diffkern.ops.timestep_embedding import timestep_embedding

if TYPE_CHECKING:
    from typing_extensions import Self


class Level(nn.Module):
    """One resolution, on the way down or up: residual blocks, attention after each if any, then the resampling."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def layer(self, i: int, x: Picture, time: Tensor, skip: Picture | None, given: Sequence[Any]) -> Picture:
        x = self.resnets[i](x, time, skip)
        return self.attentions[i](x, *given) if self.attentions else x


class Middle(nn.Module):
    """The lowest resolution: two residual blocks, attention between them if any."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)

    def forward(self, x: Picture, times: Iterator[Tensor], given: Sequence[Any]) -> Picture:
        x = self.resnets[0](x, next(times))
        for attention in self.attentions:
            x = attention(x, *given)
        return self.resnets[1](x, next(times))


class UNet(nn.Module):
    """The U. A network is a subclass, which says what attends to what."""

    CONFIG: ClassVar[type[UNetConfig]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.null_label: int | None = None
        c: UNetConfig = config
        channels = c.block_out_channels
        self.time_dim = c.time_embedding_dim or 4 * channels[0]
        scale_shift = c.resnet_time_scale_shift == "scale_shift"

        def resnet(a: int, b: int, scale: float = 1.0) -> ResnetBlock:
            return ResnetBlock(a, b, self.time_dim, c.norm_num_groups, c.norm_eps, c.dropout, scale_shift, scale)

        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], self.time_dim)
        classes = c.num_class_embeds
        self.class_embedding = Embedding(classes, self.time_dim) if classes is not None else None

        self.down_blocks = nn.ModuleList()
        layers = c.per_level(c.layers_per_block)
        skips, width = [channels[0]], channels[0]
        for i, kind in enumerate(c.down_block_types):
            widths = [width, *[channels[i]] * layers[i]]
            width = channels[i]
            level = Level([resnet(a, width) for a in widths[:-1]], self._attentions(kind, i, layers[i]))
            skips += widths[1:]
            if i < len(channels) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width, c.downsample_padding)])
                skips.append(width)
            self.down_blocks.append(level)

        self.mid_block: Middle | None = None
        if c.mid_block_type is not None:
            resnets = [resnet(width, width, float(c.mid_block_scale_factor)) for _ in range(2)]
            self.mid_block = Middle(resnets, self._attentions(c.mid_block_type, len(channels) - 1, 1))

        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(len(channels))), c.up_block_types, strict=True):
            resnets = []
            for _ in range(layers[i] + 1):
                resnets.append(resnet(width + skips.pop(), channels[i]))
                width = channels[i]
            level = Level(resnets, self._attentions(kind, i, len(resnets)))
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, channels[0], c.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], c.out_channels, 3, padding=1)
        self.time_widths = [len(weight) for weight in self._parameters_of("time_emb_proj", "weight")]

    def attention(self, kind: str, level: int) -> nn.Module | None:
        """A new attention for behind a residual block, in a block of this kind, or None if it has none. level: 0 is the
        resolution of the picture."""
        raise NotImplementedError

    def _attentions(self, kind: str, level: int, n: int) -> list[nn.Module]:
        made = (self.attention(kind, level) for _ in range(n))
        return [attention for attention in made if attention is not None]

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

    def embedding(self, timestep: Tensor, class_labels: Tensor | None, guidance: Tensor | None = None) -> Tensor:
        """The embedding [B, time_dim] of timestep [B] and class_labels int64 [B]. Raises ValueError for labels that the
        model does not take, or lacks."""
        if (class_labels is None) != (self.class_embedding is None):
            needs = "needs class labels" if class_labels is None else "is not class-conditional: it takes no labels"
            raise ValueError(f"this model {needs}")
        c = self.config
        sinusoids = timestep_embedding(timestep, self.conv_in.out_channels, c.flip_sin_to_cos, float(c.freq_shift))
        emb = self.time_embedding(sinusoids.to(self.conv_in.weight.dtype), guidance)
        if self.class_embedding is not None and class_labels is not None:
            emb = emb + self.class_embedding(class_labels)
        return emb

    def rows(self, embedding: Tensor) -> Tensor:
        """What the residual blocks add, their first bias included, or scale and shift by, given an embedding
        [B, time_dim]: side by side in the order of the blocks, [B, sum of their widths]."""
        emb = F.silu(embedding)  # every block applies it first: once is enough
        weights = self._parameters_of("time_emb_proj", "weight")
        bias = joined(self._parameters_of("time_emb_proj", "bias"))
        if self.config.resnet_time_scale_shift != "scale_shift":
            bias = bias + joined(self._parameters_of("conv1", "bias"))
        return project_side_by_side(emb, weights, bias)

    def levels(self) -> list[Level | Middle]:
        """Down, in the middle and up, in the order that they run. Every call of the network asks for their blocks: to
        go through all of its modules takes as long as several blocks."""
        middle = [] if self.mid_block is None else [self.mid_block]
        return [*_levels(self.down_blocks), *middle, *_levels(self.up_blocks)]

    def _parameters_of(self, layer: str, name: str) -> list[Tensor]:
        """A parameter of a layer that every residual block has, in the order that they run."""
        blocks = (block for level in self.levels() for block in level.resnets)
        return [getattr(getattr(block, layer), name) for block in blocks]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Also what `to` does. On a GPU the blocks' layers of the time embedding lie side by side from then on: one
        product in place of one a block."""
        super()._apply(fn, recurse)
        if self.conv_in.weight.is_cuda:
            for layer, name in (("time_emb_proj", "weight"), ("time_emb_proj", "bias"), ("conv1", "bias")):
                lay_side_by_side(self._parameters_of(layer, name))
        return self

    def through(
        self,
        x: Tensor,
        conditioning: Tensor,
        *given: Any,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        """The network itself. conditioning: what `rows` returns. given: what the attentions are given beside x.
        down_residuals, mid_residual: what a ControlNet adds to the skips, first to last, and to the middle."""
        times = iter(conditioning.split(self.time_widths, dim=1))
        x = x.contiguous(memory_format=torch.channels_last)
        h = picture(self.conv_in, 2 * x - 1 if self.config.center_input_sample else x)

        skips = [h]
        for down in _levels(self.down_blocks):
            for i in range(len(down.resnets)):
                h = down.layer(i, h, next(times), None, given)
                skips.append(h)
            if down.downsamplers is not None:
                h = down.downsamplers[0](h)
                skips.append(h)
        if down_residuals is not None:
            if len(down_residuals) != len(skips):
                raise ValueError(f"this model takes {len(skips)} down_residuals, not {len(down_residuals)}")
            skips = [Picture(skip.pixels + residual) for skip, residual in zip(skips, down_residuals, strict=True)]
        if self.mid_block is not None:
            h = self.mid_block(h, times, given)
        h = h if mid_residual is None else Picture(h.pixels + mid_residual)
        for up in _levels(self.up_blocks):
            for i in range(len(up.resnets)):
                h = up.layer(i, h, next(times), skips.pop(), given)
            if up.upsamplers is not None:
                h = up.upsamplers[0](h, skips[-1].pixels.shape[2:])
        return convolve(self.conv_out, normalised(self.conv_norm_out, h))

    @classmethod
    def from_folder(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Self:
        """Read a diffusers folder of this kind of model (config.json and safetensors), ready to sample. Raises
        ModelError, with a sentence that names what is wrong."""
        config = folder.read_config(path, cls.CONFIG.CLASS_NAME)
        with torch.device("meta"):
            model = cls(cls.CONFIG.from_dict(config))
        folder.read_weights(model, path, dtype, device)
        return folder.lay_out(model, device).eval()

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder that `from_folder`, and diffusers, read."""
        config = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        folder.write(path, {"_class_name": self.config.CLASS_NAME, **config}, self.state_dict(), dtype)


def _levels(blocks: nn.ModuleList) -> Iterator[Level]:
    return cast("Iterator[Level]", iter(blocks))

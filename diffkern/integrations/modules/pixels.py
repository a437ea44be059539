"""The modules that work on pictures: convolutions, GroupNorm, residual blocks, up- and downsamplers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diffkern.integrations.modules.base import (
    Accelerated,
    convolve,
    convolve_plain,
    is_silent,
    is_simple,
    norm_silu,
    takes,
)
from diffkern.models import blocks
from diffkern.ops.group_norm_silu import group_norm_silu


class Conv2d(Accelerated):
    replaces = ("torch.nn.Conv2d",)
    ops = ("conv2d",)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if is_simple(module):
            return None
        if module.padding_mode != "zeros":
            return f"its padding is {module.padding_mode}"
        return f"it has groups {module.groups}, dilation {module.dilation} and stride {module.stride}"

    def fused(self: Any, input: Tensor) -> Any:
        if input.dim() != 4 or not takes(self.weight, input):
            return NotImplemented
        return convolve_plain(self, input, None, False, (0, 0, 0, 0))


class GroupNorm(Accelerated):
    replaces = ("torch.nn.GroupNorm",)
    ops = ("group_norm_silu",)

    def fused(self: Any, input: Tensor) -> Any:
        return blocks.norm_silu(self, input, silu=False) if takes(self.weight, input) else NotImplemented


class ResnetBlock2D(Accelerated):
    replaces = ("diffusers.models.resnet.ResnetBlock2D",)
    ops = ("group_norm_silu", "conv2d")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        name = type(module.nonlinearity).__name__
        return None if name == "SiLU" else f"its activation is {name}, not SiLU"

    def fused(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or input_tensor.dim() != 4 or (temb is not None) != (self.time_emb_proj is not None):
            return NotImplemented
        x, h = input_tensor, norm_silu(self.norm1, input_tensor)
        x, h, upsample = _resize(self, x, h)
        h = convolve(self.conv1, h, upsample=upsample)
        if temb is None:
            h = norm_silu(self.norm2, h)
        else:
            time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = time.chunk(2, dim=1)
                h = norm_silu(self.norm2, h, scale=scale, shift=shift)
            else:
                h = norm_silu(self.norm2, h, add=time)
        return _end(self, x, h)


class ResnetBlockCondNorm2D(Accelerated):
    replaces = ("diffusers.models.resnet.ResnetBlockCondNorm2D",)
    ops = ("group_norm_silu", "conv2d")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if module.time_embedding_norm != "ada_group":
            return f"its norm is {module.time_embedding_norm}, not ada_group"
        return ResnetBlock2D.why_not(module)

    def fused(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or input_tensor.dim() != 4 or temb is None:
            return NotImplemented
        x, h = input_tensor, _ada_norm_silu(self.norm1, input_tensor, temb)
        x, h, upsample = _resize(self, x, h)
        h = convolve(self.conv1, h, upsample=upsample)
        return _end(self, x, _ada_norm_silu(self.norm2, h, temb))


def _ada_norm_silu(norm: Any, x: Tensor, embedding: Tensor) -> Tensor:
    """An AdaGroupNorm, then SiLU."""
    rows = norm.linear(embedding if norm.act is None else norm.act(embedding))
    scale, shift = rows.chunk(2, dim=1)
    return group_norm_silu(x, norm.num_groups, eps=norm.eps, scale=scale, shift=shift)


def _resize(block: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both branches after the block's up- or downsampling, or whether h is still to be doubled."""
    if block.upsample is not None:
        later = getattr(type(block.upsample), "plain", type(block.upsample)).__name__ == "Upsample2D"
        return block.upsample(x), h if later else block.upsample(h), later
    if block.downsample is not None:
        return block.downsample(x), block.downsample(h), False
    return x, h, False


def _end(block: Any, x: Tensor, h: Tensor) -> Tensor:
    """The second convolution with the residual."""
    around = x if block.conv_shortcut is None else convolve(block.conv_shortcut, x)
    h = convolve(block.conv2, h if is_silent(block.dropout) else block.dropout(h), around)
    return h if block.output_scale_factor == 1 else h / block.output_scale_factor


class Upsample2D(Accelerated):
    replaces = ("diffusers.models.upsampling.Upsample2D",)
    ops = ("conv2d",)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if module.use_conv_transpose:
            return "its convolution is transposed"
        return None if module.use_conv and module.interpolate else "it only repeats pixels"

    def fused(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.norm is not None:
            return NotImplemented
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        doubled = tuple(2 * n for n in hidden_states.shape[2:])
        if output_size is None or tuple(output_size) == doubled:
            return convolve(conv, hidden_states, upsample=True)
        return convolve(conv, F.interpolate(hidden_states, size=output_size, mode="nearest"))


class Downsample2D(Accelerated):
    replaces = ("diffusers.models.downsampling.Downsample2D",)
    ops = ("conv2d",)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return None if module.use_conv else "it only averages pixels"

    def fused(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.norm is not None:
            return NotImplemented
        # Without padding of its own it gets a column and a row of zeros at the end, as the DDPM weights want.
        return convolve(self.conv, hidden_states, pad=(0, 0, 0, 0) if self.padding else (0, 1, 0, 1))

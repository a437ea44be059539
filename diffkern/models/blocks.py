"""The blocks that UNets are made of, thin and written in ops. Modules hold parameters under diffusers' names, so that
its weights load as they are; channels_last from end to end."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.ops.attention import attention
from diffkern.ops.conv2d import conv2d
from diffkern.ops.group_norm_silu import group_norm_silu
from diffkern.ops.linear import linear


def norm_silu(norm: nn.GroupNorm, x: Tensor, silu: bool = True, **more: Tensor) -> Tensor:
    """GroupNorm with the module's parameters, then SiLU, in one op. more: `add`, `scale` and `shift` of that op."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu, **more)


def convolve(
    conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None, upsample: bool = False, padding: list[int] | None = None
) -> Tensor:
    """A convolution with the module's parameters and what follows it, in one op. padding: in place of the module's."""
    padding = [int(conv.padding[0])] if padding is None else padding
    return conv2d(x, conv.weight, conv.bias, conv.stride[0], padding, residual=residual, upsample=upsample)


def project(layer: nn.Linear, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """A linear layer with the module's parameters and what follows it, in one op. For tokens: a few rows, as of the
    time embedding, take less time in PyTorch than the choice of a backend does."""
    return linear(x, layer.weight, layer.bias, activation, residual)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, time embedding, norm, SiLU, conv, residual (Ho et al. 2020, appendix B). With `scale_shift` the
    time embedding scales and shifts the second norm instead of being added (Dhariwal & Nichol 2021). With time_dim None
    there is no time, as in an autoencoder."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.output_scale, self.dropout = scale_shift, output_scale, dropout
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x: [B, C1, H, W]. skip: [B, C2, H, W], joined to it, or None; C1 + C2 = in_channels. time: what time_emb_proj
        makes of the embedding after SiLU: [B, out_channels], twice as wide with scale_shift, or None. Returns
        [B, out_channels, H, W]."""
        x = x if skip is None else torch.cat([x, skip], dim=1)
        h = convolve(self.conv1, norm_silu(self.norm1, x))
        if time is None:
            h = norm_silu(self.norm2, h)
        elif self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = norm_silu(self.norm2, h, scale=scale, shift=shift)
        else:
            h = norm_silu(self.norm2, h, add=time)
        shortcut = x if self.conv_shortcut is None else convolve(self.conv_shortcut, x)
        h = convolve(self.conv2, F.dropout(h, self.dropout, self.training), shortcut)
        return h / self.output_scale if self.output_scale != 1 else h


def resnet_blocks(model: nn.Module) -> list[ResnetBlock]:
    """The residual blocks of a model, in the order that they were made in."""
    return [m for m in model.modules() if isinstance(m, ResnetBlock)]


class Attention(nn.Module):
    """Self-attention over the pixels, with a GroupNorm in front and a residual around."""

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float, output_scale: float = 1.0) -> None:
        super().__init__()
        self.head_dim, self.output_scale = head_dim, output_scale
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> [B, C, H, W]."""
        b, c, height, width = x.shape
        # channels_last, so that this view of the pixels as a sequence [B, H W, C] moves nothing
        tokens = norm_silu(self.group_norm, x, silu=False).permute(0, 2, 3, 1).reshape(b, height * width, c)
        q, k, v = (
            project(proj, tokens).unflatten(-1, (-1, self.head_dim)) for proj in (self.to_q, self.to_k, self.to_v)
        )
        pixels = x.permute(0, 2, 3, 1).reshape(b, height * width, c)
        out = project(cast(nn.Linear, self.to_out[0]), attention(q, k, v), residual=pixels)
        out = out.reshape(b, height, width, c).permute(0, 3, 1, 2)
        return out / self.output_scale if self.output_scale != 1 else out


class Downsample(nn.Module):
    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Halves H and W. Padding 0 means one row and column of zeros at the end only, as in the DDPM weights."""
        return convolve(self.conv, x, padding=None if self.conv.padding[0] else [0, 1, 0, 1])


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Doubles H and W."""
        return convolve(self.conv, x, upsample=True)

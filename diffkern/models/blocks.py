"""The blocks that denoisers are made of, thin and written in ops. Modules hold parameters under diffusers' names, so
that its weights load as they are; channels_last from end to end."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.available import triton_interpreted
from diffkern.layout import lay_side_by_side, memory_format
from diffkern.ops.attention import attention
from diffkern.ops.conv2d import conv2d
from diffkern.ops.conv2d_moments import conv2d_moments
from diffkern.ops.group_norm_silu import group_norm_silu
from diffkern.ops.linear import GATED, linear
from diffkern.ops.query_key_value import query_key_value
from diffkern.packing import packed_together


class Picture(NamedTuple):
    """What goes from block to block: pixels [B, C, H, W], and their moments if the convolution that made them gave them
    (`conv2d_moments`)."""

    pixels: Tensor
    moments: Tensor | None = None


def norm_silu(norm: nn.GroupNorm, x: Tensor, silu: bool = True, **more: Tensor | None) -> Tensor:
    """GroupNorm with the parameters of its module, then SiLU, in one op. more: the op's add, scale, shift, skip and
    moments."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu, **more)


def normalised(norm: nn.GroupNorm, x: Picture, skip: Picture | None = None, silu: bool = True) -> Tensor:
    """`norm_silu` of a picture, or of two that are joined, by their moments if all have them."""
    if skip is None:
        return norm_silu(norm, x.pixels, silu, moments=x.moments)
    if x.moments is None or skip.moments is None:
        return norm_silu(norm, x.pixels, silu, skip=skip.pixels)
    return norm_silu(norm, x.pixels, silu, skip=skip.pixels, moments=x.moments, skip_moments=skip.moments)


def convolve(
    conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None, upsample: bool = False, padding: list[int] | None = None
) -> Tensor:
    """A convolution with the module's parameters and what follows it, in one op. padding: in place of the module's."""
    padding = [int(conv.padding[0])] if padding is None else padding
    return conv2d(x, conv.weight, conv.bias, conv.stride[0], padding, residual=residual, upsample=upsample)


def picture(
    conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None, upsample: bool = False, padding: list[int] | None = None
) -> Picture:
    """`convolve`, with the moments of the result for the norm behind it, where a table says that they pay."""
    if not _pays(conv, x, upsample) or memory_format(x) is not torch.channels_last:
        return Picture(convolve(conv, x, residual, upsample, padding))
    padding = [int(conv.padding[0])] if padding is None else padding
    given = conv2d_moments(x, conv.weight, conv.bias, conv.stride[0], padding, residual=residual, upsample=upsample)
    return Picture(*given)


def _pays(conv: nn.Conv2d, x: Tensor, upsample: bool) -> bool:
    """Whether the moments of what a convolution makes spare more time than they take."""
    # On a CPU none are asked for. What trains goes through the reference; what is compiled cannot ask what is tried.
    if not (x.is_cuda or triton_interpreted()) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    from diffkern.kernels.conv2d_moments import pays

    return pays(x, conv.out_channels, conv.stride[0], upsample)


def project(layer: nn.Linear, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """A linear layer with the module's parameters and what follows it, in one op. For tokens: a few rows, as of the
    time embedding, take less time in PyTorch than the choice of a backend does."""
    return linear(x, layer.weight, layer.bias, activation, residual)


def project_side_by_side(x: Tensor, weights: list[Tensor], bias: Tensor) -> Tensor:
    """What linear layers with these weights make of a few rows x: [B, K], side by side, in one product where that takes
    no copy of the weights. bias: of all layers, [sum of their widths]. Returns [B, sum of their widths]."""
    whole = packed_together(weights)
    if whole is not None:
        return F.linear(x, whole, bias)
    biases = bias.split([len(weight) for weight in weights])
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=1)


def tokens_of(x: Tensor) -> Tensor:
    """The pixels [B, C, H, W] as a sequence [B, H W, C]: of channels_last ones a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pixels_of(tokens: Tensor, size: torch.Size) -> Tensor:
    """Tokens [B, H W, C] as the pixels [B, C, H, W] of a picture of this size, channels_last: a view."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


class Embedding(nn.Embedding):
    """A vector a label. On the meta device, where networks are made whose weights are then read, none are drawn: for
    normal numbers there torch imports its compiler, which takes longer than a picture."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class TimestepEmbedding(nn.Module):
    """A vector through two layers. With condition_dim a second vector is added to it first, such as the embedding of a
    guidance scale (Meng et al. 2023)."""

    def __init__(self, in_dim: int, dim: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.cond_proj = nn.Linear(condition_dim, in_dim, bias=False) if condition_dim is not None else None
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition.to(x.dtype))
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

    def forward(self, x: Picture, time: Tensor | None = None, skip: Picture | None = None) -> Picture:
        """x: [B, C1, H, W]. skip: [B, C2, H, W], joined to it, or None; C1 + C2 = in_channels. time: what
        time_emb_proj makes of the embedding after SiLU: [B, out_channels], twice as wide with scale_shift, else with
        conv1's bias added; or None. Returns [B, out_channels, H, W]."""
        # A line for each op: inside a call of the next its input would stay in memory until that ends.
        h = normalised(self.norm1, x, skip)
        if time is None and not h.is_cuda:  # a convolution on a CPU adds its bias for nothing
            h = convolve(self.conv1, h)
            h = norm_silu(self.norm2, h)
        elif self.scale_shift and time is not None:
            scale, shift = time.chunk(2, dim=1)
            h, moments = picture(self.conv1, h)
            h = norm_silu(self.norm2, h, scale=scale, shift=shift, moments=moments)
        else:
            # The bias is added where the norm reads: on a GPU a pass over the picture less. That pass would be the one
            # that has the moments: the norm takes them itself, which reads no more.
            add = cast(Tensor, self.conv1.bias).expand(len(h), -1) if time is None else time
            h = conv2d(h, self.conv1.weight)
            h = norm_silu(self.norm2, h, add=add)
        around = self._shortcut(x.pixels, None if skip is None else skip.pixels)
        h = F.dropout(h, self.dropout) if self.training else h
        y = picture(self.conv2, h, around)
        return Picture(y.pixels / self.output_scale) if self.output_scale != 1 else y

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        conv = self.conv_shortcut
        if conv is None:
            return x if skip is None else torch.cat([x, skip], dim=1)
        if skip is None:
            return convolve(conv, x)
        # The two are never joined: of a 1 x 1 convolution each takes its part of the weight.
        own, other = conv.weight.split([x.shape[1], skip.shape[1]], dim=1)
        return conv2d(skip, other, residual=conv2d(x, own, conv.bias))


class Context(NamedTuple):
    """What tokens attend to. keys, values: [R, T, H, D]. mask: bool [R, 1, 1, T], True where there is a key, or None.
    Each of the R rows serves B / R samples of a batch in turn: a prompt that is the same for all has one row."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


class TokenAttention(nn.Module):
    """Attention of tokens with dim features to themselves, or to others with context_dim features. bias: of the
    projections to queries, keys and values."""

    def __init__(self, dim: int, heads: int, bias: bool = True, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context_dim or dim, dim, bias=bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Also what `to` does. On a GPU the three weights that have one input lie side by side from then on: one
        product takes them as they are."""
        super()._apply(fn, recurse)
        layers = (self.to_q, self.to_k, self.to_v)
        if self.to_q.weight.is_cuda and self.to_q.weight.shape == self.to_k.weight.shape:
            lay_side_by_side([layer.weight for layer in layers])
            if self.to_q.bias is not None:
                lay_side_by_side([layer.bias for layer in layers])
        return self

    def context(self, x: Tensor, mask: Tensor | None = None) -> Context:
        """The keys and values of tokens [R, T, C]."""
        keys, values = (project(layer, x).unflatten(-1, (self.heads, -1)) for layer in (self.to_k, self.to_v))
        return Context(keys, values, mask)

    def forward(self, x: Tensor, context: Context | None = None, residual: Tensor | None = None) -> Tensor:
        """x: [B, T, C], which attends to itself if there is no context. Returns [B, T, C], residual added."""
        if context is None:
            q, k, v = self.to_q, self.to_k, self.to_v
            every = query_key_value(x, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias)
            out = attention(*every.unflatten(-1, (self.heads, -1)).unbind(-3))
        else:
            keys, values, mask = context
            # Samples with one context are to the attention more queries of one sample: nothing has to be repeated.
            rows = len(keys)
            queries = project(self.to_q, x).view(rows, len(x) // max(1, rows) * x.shape[1], *keys.shape[2:])
            out = attention(queries, keys, values, mask=mask).view(x.shape)
        return project(cast(nn.Linear, self.to_out[0]), out, residual=residual)


class Attention(TokenAttention):
    """Self-attention over the pixels, with a GroupNorm in front and a residual around."""

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float, output_scale: float = 1.0) -> None:
        super().__init__(channels, channels // head_dim)
        self.output_scale = output_scale
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Picture) -> Picture:  # type: ignore[override]
        """x: [B, C, H, W] -> [B, C, H, W]."""
        tokens = tokens_of(normalised(self.group_norm, x, silu=False))
        out = pixels_of(super().forward(tokens, residual=tokens_of(x.pixels)), x.pixels.shape[2:])
        return Picture(out / self.output_scale if self.output_scale != 1 else out)


class _Activation(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)


class FeedForward(nn.Module):
    """The MLP of a transformer block, four times as wide inside. activation: one that the op `linear` has."""

    def __init__(self, dim: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        first = _Activation(dim, 8 * dim if activation in GATED else 4 * dim)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C], residual added."""
        first, last = cast(_Activation, self.net[0]).proj, cast(nn.Linear, self.net[2])
        return project(last, project(first, x, self.activation), residual=residual)


class Downsample(nn.Module):
    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Picture) -> Picture:
        """Halves H and W. Padding 0 means one row and column of zeros at the end only, as in the DDPM weights."""
        return picture(self.conv, x.pixels, padding=None if self.conv.padding[0] else [0, 1, 0, 1])


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Picture, size: torch.Size | None = None) -> Picture:
        """Doubles H and W, or makes them `size`: that of a picture which halving had to round up."""
        height, width = x.pixels.shape[2:]
        if size is None or tuple(size) == (2 * height, 2 * width):
            return picture(self.conv, x.pixels, upsample=True)
        return picture(self.conv, F.interpolate(x.pixels, size, mode="nearest"))

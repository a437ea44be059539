"""The autoencoder of latent diffusion (Rombach et al. 2022): diffusers' `AutoencoderKL`, same config, same parameter
names, in ops and channels_last. It is that of Stable Diffusion 1 to 3, SDXL and Flux."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffkern.layout import accumulate
from diffkern.models import folder
from diffkern.models.blocks import Attention, Downsample, ResnetBlock, Upsample, convolve, normalised, picture
from diffkern.models.recorded import recorded
from diffkern.ops.reparameterize import reparameterize

EPS = 1e-6  # of all norms: no config value
# The pixels that are worked on at once, one picture of Stable Diffusion's: more take more memory and no less time.
PIXELS = 512 * 512


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The keys of a diffusers `AutoencoderKL` config, with diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    # What this implementation can do, where diffusers can do more.
    ALLOWED: ClassVar[dict[str, tuple[Any, ...]]] = {"act_fn": ("silu", "swish")}

    def __post_init__(self) -> None:
        for f in fields(self):
            low = -65536 if f.name in ("shift_factor", "latents_mean") else 0
            folder.check_type(f.name, getattr(self, f.name), str(f.type), low)
        for key, allowed in self.ALLOWED.items():
            folder.check_choice(key, getattr(self, key), allowed)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for block in getattr(self, key):
                folder.check_choice(key, block, (kind,))
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.block_out_channels):
            raise folder.ModelError("down_block_types, up_block_types and block_out_channels differ in length")
        for key, high in (
            ("in_channels", 65536),
            ("out_channels", 65536),
            ("latent_channels", 65536),
            ("norm_num_groups", 65536),
            ("layers_per_block", 64),
            ("block_out_channels", 65536),
        ):
            value = getattr(self, key)
            if not all(1 <= v <= high for v in (value if isinstance(value, tuple) else (value,))) or value == ():
                raise folder.ModelError(f"config.json has {key} {value!r}: allowed here is 1 to {high}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise folder.ModelError(
                    f"block_out_channels has {channels}, which norm_num_groups {self.norm_num_groups} does not divide"
                )
        if (self.latents_mean is None) != (self.latents_std is None):
            raise folder.ModelError("config.json must have latents_mean and latents_std together or neither")
        if self.latents_mean is not None and self.shift_factor is not None:
            raise folder.ModelError("config.json has both latents_mean and shift_factor: allowed here is one of them")
        for key in ("latents_mean", "latents_std"):
            value = getattr(self, key)
            if value is not None and len(value) != self.latent_channels:
                raise folder.ModelError(f"config.json has {len(value)} numbers in {key}, not {self.latent_channels}")
        for key, given in (("scaling_factor", (self.scaling_factor,)), ("latents_std", self.latents_std or ())):
            if 0 in given:
                raise folder.ModelError(f"config.json has {key} {getattr(self, key)!r}: this must be above 0")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> AutoencoderKLConfig:
        """Read a diffusers config. Raises ModelError naming a value that this implementation cannot build."""
        return cls(**folder.values_of(cls, config))


def _pictures(pixels: int) -> int:
    """How many pictures of so many pixels are worked on at once."""
    return max(1, PIXELS // pixels)


class Posterior(NamedTuple):
    """What the encoder makes of pictures: N(mean, exp(logvar)), both [B, latent_channels, H, W]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, keys: Tensor) -> Tensor:
        """A draw, with the noise of `keys` [B, 2], see `noise_keys`: the op `reparameterize`."""
        return reparameterize(self.mean, self.logvar, keys)


class _Level(nn.Module):
    """One resolution: residual blocks, then the way to the next one, if any."""

    def __init__(self, resnets: list[ResnetBlock], down: Downsample | None = None, up: Upsample | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = None if down is None else nn.ModuleList([down])
        self.upsamplers = None if up is None else nn.ModuleList([up])

    def layers(self) -> Iterator[nn.Module]:
        for modules in (self.resnets, self.downsamplers, self.upsamplers):
            yield from modules or ()


class _Mid(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, channels, groups, EPS)] if attention else [])

    def layers(self) -> Iterator[nn.Module]:
        yield self.resnets[0]
        yield from self.attentions
        yield self.resnets[1]


class _Coder(nn.Module):
    """What encoder and decoder share: a convolution, the blocks, and norm, SiLU, convolution."""

    conv_in: nn.Conv2d
    conv_norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def blocks(self) -> Iterator[_Level | _Mid]:
        raise NotImplementedError

    @recorded
    def forward(self, x: Tensor) -> Tensor:
        h = picture(self.conv_in, x)
        # One loop over all layers: inside a call of a block its input would stay in memory until the block ends.
        for layer in (layer for block in self.blocks() for layer in block.layers()):
            h = layer(h)
        return convolve(self.conv_out, normalised(self.conv_norm_out, h))


class _Encoder(_Coder):
    def __init__(self, c: AutoencoderKLConfig) -> None:
        super().__init__()
        channels, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = channels[0]
        for i, out in enumerate(channels):
            widths = [width, *[out] * (c.layers_per_block - 1)]
            down = Downsample(out, 0) if i < len(channels) - 1 else None
            self.down_blocks.append(_Level([ResnetBlock(a, out, None, groups, EPS) for a in widths], down=down))
            width = out
        self.mid_block = _Mid(width, groups, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 2 * c.latent_channels, 3, padding=1)

    def blocks(self) -> Iterator[_Level | _Mid]:
        yield from cast("Iterator[_Level]", iter(self.down_blocks))
        yield self.mid_block


class _Decoder(_Coder):
    def __init__(self, c: AutoencoderKLConfig) -> None:
        super().__init__()
        channels, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _Mid(channels[0], groups, c.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        width = channels[0]
        for i, out in enumerate(channels):
            widths = [width, *[out] * c.layers_per_block]
            up = Upsample(out) if i < len(channels) - 1 else None
            self.up_blocks.append(_Level([ResnetBlock(a, out, None, groups, EPS) for a in widths], up=up))
            width = out
        self.conv_norm_out = nn.GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def blocks(self) -> Iterator[_Level | _Mid]:
        yield self.mid_block
        yield from cast("Iterator[_Level]", iter(self.up_blocks))


class AutoencoderKL(nn.Module):
    """Pictures [B, in_channels, H, W] on [-1, 1] to latents and back. `encode` and `decode` are those of diffusers;
    `to_latents` and `to_pictures` also scale the latents as the denoiser knows them:

        pictures = vae.to_pictures(diffkern.sample(denoiser, table, 4))

    Every call takes any floating dtype and computes in that of the weights. float16 overflows in some of these models,
    that of SDXL among them (`force_upcast` in the config is set, as it is by default): bfloat16 does not."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder = _Encoder(c), _Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1) if c.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1) if c.use_post_quant_conv else None

    @property
    def factor(self) -> int:
        """How many pixels a latent is high and wide."""
        return 1 << (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> Posterior:
        """x: [B, in_channels, H, W] on [-1, 1]. Returns mean and logvar, clamped to [-30, 20], each
        [B, latent_channels, H // factor, W // factor]. Raises ValueError for another shape, or less than a latent."""
        x = self._input(x, "x", self.config.in_channels, self.factor)
        h = torch.cat([self._encode(part) for part in x.split(_pictures(x.shape[2] * x.shape[3]))])
        mean, logvar = (half.contiguous(memory_format=torch.channels_last) for half in h.chunk(2, dim=1))
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """z: [B, latent_channels, H, W], as `encode` gives them. Returns [B, out_channels, factor H, factor W], about
        on [-1, 1], channels_last, dtype of the weights. Raises ValueError for another shape."""
        z = self._input(z, "z", self.config.latent_channels, 1)
        pictures = _pictures(z.shape[2] * z.shape[3] * self.factor**2)
        return torch.cat([self._decode(part) for part in z.split(pictures)])

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_channels, H, W] on [-1, 1]. Returns what its most likely latents decode to."""
        return self.decode(self.encode(x).mean)

    def to_latents(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x: [B, in_channels, H, W] on [-1, 1]. keys: of the noise to draw latents with, int64 [B, 2], or None for the
        mean. Returns what a denoiser is trained on: [B, latent_channels, H // factor, W // factor], standardised with
        the config's scaling_factor and shift_factor, or latents_mean and latents_std."""
        posterior = self.encode(x)
        z = posterior.mean if keys is None else posterior.sample(keys)
        mean, std = self._standard(z)
        return ((z - mean) / std).to(z.dtype)

    def to_pictures(self, latents: Tensor) -> Tensor:
        """latents: [B, latent_channels, H, W], as `to_latents` gives and a denoiser draws them. Returns what `decode`
        does."""
        mean, std = self._standard(latents)
        return self.decode(latents * std + mean)

    def _standard(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and spread of latents before they are standardised, [1 or C, 1, 1]; not in half precision, so that
        what they are applied to is rounded once."""
        c = self.config
        mean = c.latents_mean or (c.shift_factor or 0.0,)
        std = [s / c.scaling_factor for s in c.latents_std or (1.0,)]
        dtype = accumulate(z.dtype)
        return (
            torch.tensor(mean, dtype=dtype, device=z.device).reshape(-1, 1, 1),
            torch.tensor(std, dtype=dtype, device=z.device).reshape(-1, 1, 1),
        )

    def _encode(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return h if self.quant_conv is None else convolve(self.quant_conv, h)

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else convolve(self.post_quant_conv, z))

    def _input(self, x: Tensor, name: str, channels: int, least: int) -> Tensor:
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < least:
            raise ValueError(f"{name} must be [B, {channels}, H, W], H and W at least {least}, not {list(x.shape)}")
        return x.to(self.decoder.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)

    @classmethod
    def from_folder(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> AutoencoderKL:
        """Read a diffusers `AutoencoderKL` folder (config.json and safetensors), ready to use. Raises ModelError, with
        a sentence that names what is wrong."""
        config = folder.read_config(path, "AutoencoderKL")
        with torch.device("meta"):
            model = cls(AutoencoderKLConfig.from_dict(config))
        folder.read_weights(model, path, dtype, device)
        return folder.lay_out(model, device).eval()

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder that `from_folder`, and diffusers, read."""
        config = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        folder.write(path, {"_class_name": "AutoencoderKL", **config}, self.state_dict(), dtype)

"""The diffusion transformer (DiT, Peebles & Xie 2023): diffusers' `DiTTransformer2DModel`, same config, same parameter
names, in ops. A gated residual and the norm behind it are one op, so that a block touches its stream twice."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.layout import joined
from diffkern.models import folder
from diffkern.models.blocks import (
    Embedding,
    FeedForward,
    TimestepEmbedding,
    TokenAttention,
    project,
    project_side_by_side,
)
from diffkern.models.recorded import recorded
from diffkern.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from diffkern.ops.layer_norm_modulate import layer_norm_modulate
from diffkern.ops.timestep_embedding import timestep_embedding

SINUSOIDS = 256  # numbers that the timestep is given as
EPS = 1e-6  # of the norms whose eps is no config value


@dataclass(frozen=True)
class DiTConfig:
    """The keys of a diffusers `DiTTransformer2DModel` config that shape the network, with diffusers' defaults."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5

    # What this implementation can do, where diffusers can do more.
    ALLOWED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "dropout": (0.0,),
        "activation_fn": ("gelu-approximate",),
        "upcast_attention": (False,),
        "norm_type": ("ada_norm_zero",),
    }

    def __post_init__(self) -> None:
        for f in fields(self):
            folder.check_type(f.name, getattr(self, f.name), str(f.type))
        for key, allowed in self.ALLOWED.items():
            folder.check_choice(key, getattr(self, key), allowed)
        for key, low, high in (
            ("num_attention_heads", 1, 1024),
            ("attention_head_dim", 1, 1024),
            ("num_layers", 1, 256),
            ("patch_size", 1, 256),
            ("in_channels", 1, 65536),
            ("sample_size", self.patch_size, 65536),
        ):
            if not low <= getattr(self, key) <= high:
                raise folder.ModelError(
                    f"config.json has {key} {getattr(self, key)!r}: allowed here is {low} to {high}"
                )
        if self.width % 4:
            raise folder.ModelError(
                f"config.json has num_attention_heads * attention_head_dim {self.width}: the sines and cosines of two "
                "axes need a multiple of 4"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> DiTConfig:
        """Read a diffusers config. Raises ModelError naming a value that this implementation cannot build."""
        return cls(**folder.values_of(cls, config))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def positions(height: int, width: int, dim: int, base: int, device: torch.device) -> Tensor:
    """The fixed embedding of a grid of patches, float32 [height * width, dim]: the sinusoids of the column, then of the
    row. Other grids than that of the config, base patches high, are stretched over its range."""

    def axis(n: int) -> Tensor:
        place = torch.arange(n, dtype=torch.float32, device=device) / (n / base)
        return timestep_embedding.reference(place.double(), dim // 2, flip_sin_to_cos=False).float()

    row, column = axis(height)[:, None], axis(width)[None]
    pair = (column.expand(height, -1, -1), row.expand(-1, width, -1))
    return torch.cat(pair, dim=-1).reshape(height * width, dim)


class _PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)
        self.base = config.sample_size // patch

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, width]: one token a patch, with its position."""
        x = self.proj(x)
        where = positions(x.shape[2], x.shape[3], x.shape[1], self.base, x.device)
        return (x.flatten(2).transpose(1, 2) + where).to(x.dtype).contiguous()


class _LabelEmbedding(nn.Module):
    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = Embedding(classes + 1, dim)  # the last one is the null label


class _Conditioning(nn.Module):
    """What a block is told: the timestep and the label."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOIDS, dim)
        self.class_embedder = _LabelEmbedding(classes, dim)


class _AdaLayerNormZero(nn.Module):
    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.emb = _Conditioning(classes, dim)
        self.linear = nn.Linear(dim, 6 * dim)


class _Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.width
        self.norm1 = _AdaLayerNormZero(config.num_embeds_ada_norm, dim)
        self.attn1 = TokenAttention(dim, config.num_attention_heads, config.attention_bias)
        self.norm3 = nn.LayerNorm(dim, config.norm_eps, config.norm_elementwise_affine)
        self.ff = FeedForward(dim, "gelu_tanh")


class DiT(nn.Module):
    """A class-conditional denoiser: (x [B, C, H, W], timestep [B], class labels [B]) -> [B, C, H, W]."""

    OPS = (
        "timestep_embedding",
        "linear",
        "query_key_value",
        "attention",
        "layer_norm_modulate",
        "gate_residual_norm_modulate",
    )  # that a call runs

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.null_label: int | None = config.num_embeds_ada_norm
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = _PatchEmbed(config)
        self.transformer_blocks = nn.ModuleList([_Block(config) for _ in range(config.num_layers)])
        self.proj_out_1 = nn.Linear(config.width, 2 * config.width)
        self.proj_out_2 = nn.Linear(config.width, config.patch_size**2 * self.out_channels)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample, from the config."""
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    @property
    def num_classes(self) -> int:
        """How many labels there are; the null label is one more."""
        return self.config.num_embeds_ada_norm

    def conditioning(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """All that the network is told by timestep [B] and class_labels int64 [B]: the shift, scale and gate in front
        of attention and MLP of each block, then the last shift and scale. A third of a DiT's weights are read here and
        nowhere else: give a run's timesteps and labels at once, and slices of the result to `forward`.

        Returns [6 * num_layers + 2, B, width]."""
        dtype = self.proj_out_1.weight.dtype
        sinusoids = timestep_embedding(timestep, SINUSOIDS, freq_shift=1.0).to(dtype)
        norms = [cast(_Block, b).norm1 for b in self.transformer_blocks]
        first = [norm.emb.timestep_embedder.linear_1 for norm in norms]
        bias = joined([layer.bias for layer in first])
        hidden = F.silu(project_side_by_side(sinusoids, [layer.weight for layer in first], bias))
        each = hidden.chunk(len(norms), dim=1)
        times = [norm.emb.timestep_embedder.linear_2(h) for norm, h in zip(norms, each, strict=True)]
        labels = [norm.emb.class_embedder.embedding_table(class_labels) for norm in norms]
        # Of all blocks at once: a kernel each for a few rows takes its launch, not its work.
        vectors = F.silu(torch.stack(times) + torch.stack(labels)).unbind()
        rows = [project(norm.linear, v) for norm, v in zip(norms, vectors, strict=True)]
        rows.append(self.proj_out_1(vectors[0]))
        return torch.cat([row.unflatten(1, (-1, self.config.width)).transpose(0, 1) for row in rows])

    @recorded
    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        conditioning: Tensor | None = None,
        with_sigma: bool = False,
    ) -> Tensor:
        """x: [B, C, H, W], H and W multiples of patch_size. timestep: [B] or scalar, may be fractional. class_labels:
        int64 [B]; config.num_embeds_ada_norm is the null label. conditioning: that of the two, instead of them.

        Returns the prediction, [B, C, H, W] contiguous in the dtype of the weights, and with with_sigma all
        out_channels, the learned variance behind the prediction (Nichol & Dhariwal 2021)."""
        patch = self.config.patch_size
        if x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(f"x is {x.shape[2]} by {x.shape[3]}, both must be multiples of the patch size {patch}")
        if conditioning is None:
            if timestep is None or class_labels is None:
                raise ValueError("this model needs a timestep and class labels, or its conditioning")
            t = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
            conditioning = self.conditioning(t, class_labels)

        rows = conditioning.unbind()
        stream = self.pos_embed(x)
        h = layer_norm_modulate(stream, rows[0], rows[1], eps=EPS)
        for i, block in enumerate(cast("list[_Block]", self.transformer_blocks)):
            _, _, gate, shift, scale, last_gate, next_shift, next_scale = rows[6 * i : 6 * i + 8]
            norm = block.norm3
            stream, h = gate_residual_norm_modulate(
                stream, block.attn1(h), gate, shift, scale, norm.weight, norm.bias, norm.eps
            )
            stream, h = gate_residual_norm_modulate(stream, block.ff(h), last_gate, next_shift, next_scale, eps=EPS)

        channels = self.out_channels
        patches = project(self.proj_out_2, h).unflatten(2, (patch, patch, channels))
        patches = patches.unflatten(1, (x.shape[2] // patch, x.shape[3] // patch))
        out = patches if with_sigma else patches[..., : x.shape[1]]
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).contiguous()

    @classmethod
    def from_folder(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> DiT:
        """Read a diffusers `DiTTransformer2DModel` folder (config.json and safetensors), ready to sample. Raises
        ModelError, with a sentence that names what is wrong."""
        # Old folders, the published DiT-XL/2 among them, name the class that DiTTransformer2DModel was split from.
        config = folder.read_config(path, "DiTTransformer2DModel", "Transformer2DModel")
        with torch.device("meta"):
            model = cls(DiTConfig.from_dict(config))
        folder.read_weights(model, path, dtype, device)
        return folder.lay_out(model, device).eval()

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder that `from_folder`, and diffusers, read."""
        config = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        folder.write(path, {"_class_name": "DiTTransformer2DModel", **config}, self.state_dict(), dtype)

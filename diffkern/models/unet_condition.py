"""The UNet of latent diffusion with a prompt (Rombach et al. 2022; SD 1.5, SD 2 and SDXL): diffusers'
`UNet2DConditionModel`, same config, same parameter names, in ops and channels_last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from diffkern.models import folder
from diffkern.models.blocks import Context, TimestepEmbedding
from diffkern.models.recorded import recorded
from diffkern.models.transformer import SpatialTransformer, TransformerBlock
from diffkern.models.unet_base import UNet
from diffkern.models.unet_config import UNetConfig
from diffkern.ops.timestep_embedding import timestep_embedding


@dataclass(frozen=True)
class UNet2DConditionConfig(UNetConfig):
    """The keys of a diffusers `UNet2DConditionModel` config that shape the network, with diffusers' defaults."""

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    # The number of heads: diffusers gave it this name by mistake and kept it, as thousands of configs had it by then.
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | None = None
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    reverse_transformer_layers_per_block: int | None = None
    use_linear_projection: bool = False
    upcast_attention: bool | None = False  # either way: the op computes in float32
    only_cross_attention: bool = False
    mid_block_only_cross_attention: bool | None = None
    dual_cross_attention: bool = False
    cross_attention_norm: str | None = None
    attention_type: str = "default"
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    class_embeddings_concat: bool = False
    time_cond_proj_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"
    ALLOWED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **UNetConfig.ALLOWED,
        "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
        "num_attention_heads": (None,),
        "reverse_transformer_layers_per_block": (None,),
        "only_cross_attention": (False,),
        "mid_block_only_cross_attention": (False, None),
        "dual_cross_attention": (False,),
        "cross_attention_norm": (None,),
        "attention_type": ("default",),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "addition_embed_type": ("text_time", None),
        "class_embeddings_concat": (False,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
    }
    BLOCKS: ClassVar[dict[str, tuple[str, ...]]] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("attention_head_dim", 1, 1024)
        self.check_range("transformer_layers_per_block", 1, 64)
        self.check_range("cross_attention_dim", 1, 65536)
        for channels, heads in zip(self.block_out_channels, self.per_level(self.attention_head_dim), strict=True):
            if channels % heads:
                raise folder.ModelError(
                    f"block_out_channels has {channels}, which the number of heads, attention_head_dim {heads}, "
                    "does not divide"
                )
        if self.addition_embed_type is not None:
            self.check_range("addition_time_embed_dim", 1, 65536)
            self.check_range("projection_class_embeddings_input_dim", 1, 65536)


class UNet2DCondition(UNet):
    """A denoiser of latents, given a prompt: (x [B, C, H, W], timestep [B], encoder_hidden_states [B, T, D]) ->
    [B, out_channels, H, W]. To sample, bind the prompt first: `diffkern.sample(unet.given(prompt), table)`."""

    # that a call runs
    OPS = ("timestep_embedding", "conv2d", "group_norm_silu", "linear", "query_key_value", "attention")
    CONFIG = UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__(config)
        if config.time_cond_proj_dim is not None:
            sinusoids = config.block_out_channels[0]
            self.time_embedding = TimestepEmbedding(sinusoids, self.time_dim, config.time_cond_proj_dim)
        self.add_embedding: TimestepEmbedding | None = None
        if config.projection_class_embeddings_input_dim is not None and config.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, self.time_dim)

    def attention(self, kind: str, level: int) -> SpatialTransformer | None:
        c = self.config
        if "CrossAttn" not in kind:
            return None
        heads, layers = (c.per_level(v)[level] for v in (c.attention_head_dim, c.transformer_layers_per_block))
        return SpatialTransformer(
            c.block_out_channels[level], heads, c.cross_attention_dim, layers, c.norm_num_groups,
            c.use_linear_projection,
        )  # fmt: skip

    def conditioning(
        self,
        timestep: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """All that the residual blocks are told: the rows that they add, or scale and shift by, side by side in the
        order of the blocks. timestep: [B]. For SDXL text_embeds [R, P], the pooled prompt, and time_ids [R, 6], the
        size, crop and target size of the picture. class_labels: int64 [R], given exactly if the model is
        class-conditional. timestep_cond: [R, D] for a model distilled from guidance (LCM), the embedding of the scale,
        `timestep_embedding(1000 * (scale - 1), D, False, 1)`. R is B, or 1 or 2 as in `forward`.

        Returns [B, sum of the blocks' widths]. Raises ValueError for what the model does not take, or lacks."""
        text_embeds, time_ids, class_labels, timestep_cond = (
            None if t is None else t.repeat_interleave(_share(len(t), len(timestep)), 0)
            for t in (text_embeds, time_ids, class_labels, timestep_cond)
        )
        if timestep_cond is not None and self.time_embedding.cond_proj is None:
            raise ValueError("this model takes no timestep_cond")
        if (text_embeds is None) != (self.add_embedding is None) or (time_ids is None) != (self.add_embedding is None):
            takes = "takes no" if self.add_embedding is None else "needs"
            raise ValueError(f"this model {takes} text_embeds and time_ids")
        embedding = self.embedding(timestep, class_labels, timestep_cond)
        if self.add_embedding is not None and text_embeds is not None and time_ids is not None:
            c = self.config
            rows, numbers = time_ids.shape
            width = c.addition_time_embed_dim
            sinusoids = timestep_embedding(time_ids.flatten(), width, c.flip_sin_to_cos, float(c.freq_shift))
            sinusoids = sinusoids.view(rows, numbers * width).to(embedding.dtype)
            added = torch.cat([text_embeds.to(embedding.dtype), sinusoids], dim=1)
            if added.shape[1] != c.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"text_embeds {list(text_embeds.shape)} and time_ids {list(time_ids.shape)} make {added.shape[1]} "
                    f"numbers, the model takes {c.projection_class_embeddings_input_dim}"
                )
            embedding = embedding + self.add_embedding(added)
        return self.rows(embedding)

    def prompts(self, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Iterator[Context]:
        """The keys and values of a prompt [R, T, D] for each transformer block, one after the other. mask: [R, T], of
        1 where there is a token and 0 where there is none. Raises ValueError for a prompt or mask of another shape."""
        width, shape = self.config.cross_attention_dim, list(encoder_hidden_states.shape)
        if len(shape) != 3 or shape[2] != width:
            raise ValueError(f"encoder_hidden_states must be [B, T, {width}], not {shape}")
        if mask is not None and list(mask.shape) != shape[:2]:
            raise ValueError(f"the mask must be {shape[:2]} as encoder_hidden_states is, not {list(mask.shape)}")
        mask = None if mask is None else mask.bool()[:, None, None]
        transformers = cast("list[SpatialTransformer]", [a for level in self.levels() for a in level.attentions])
        blocks = (cast(TransformerBlock, block) for t in transformers for block in t.transformer_blocks)
        tokens = encoder_hidden_states.to(self.conv_in.weight.dtype)
        return (block.attn2.context(tokens, mask) for block in blocks)

    @torch.no_grad()
    def given(self, encoder_hidden_states: Tensor, mask: Tensor | None = None, **told: Tensor) -> Given:
        """The model with a prompt [R, T, D] for a whole run, whose keys and values are computed here, once: what
        `diffkern.sample` takes. R is 1, or 2 for guidance, the negative prompt first; as many as a batch has samples,
        twice as many with guidance, are one prompt each. mask: as in `prompts`. told: what `conditioning` takes beside
        the timestep, also R rows. The weights are taken as they are now: bind again after a change."""
        return Given(self, list(self.prompts(encoder_hidden_states, mask)), told)

    @recorded
    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        conditioning: Tensor | None = None,
        prompts: Iterable[Context] | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
        **told: Tensor,
    ) -> Tensor:
        """x: [B, C, H, W]. timestep: [B] or scalar, may be fractional. encoder_hidden_states: the prompt [R, T, D],
        where R is B, or 1 for all, or 2 for the two halves of the batch. mask: as in `prompts`. told: what
        `conditioning` takes beside the timestep. conditioning and prompts: what the methods of these names return,
        instead of these. down_residuals, mid_residual: a ControlNet's (Zhang et al. 2023).

        Returns [B, out_channels, H, W], channels_last, dtype of the weights. Raises ValueError for what the model does
        not take, or lacks."""
        if prompts is None:
            if encoder_hidden_states is None:
                raise ValueError("this model needs encoder_hidden_states, the prompt: give it, or sample with given()")
            _share(len(encoder_hidden_states), len(x))
            prompts = self.prompts(encoder_hidden_states, mask)
        if conditioning is None:
            if timestep is None:
                raise ValueError("this model needs a timestep, or its conditioning")
            t = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
            conditioning = self.conditioning(t, **told)
        return self.through(x, conditioning, iter(prompts), down_residuals=down_residuals, mid_residual=mid_residual)


class Given(nn.Module):
    """A `UNet2DCondition` with its prompt: (x [B, C, H, W], timestep [B]) -> [B, out_channels, H, W]."""

    def __init__(self, model: UNet2DCondition, prompts: list[Context], told: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.prompts, self.told = model, prompts, told

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample, from the config."""
        return self.model.sample_shape

    def conditioning(self, timestep: Tensor) -> Tensor:
        """That of the model for each timestep [N] with each of the R rows that it is told: [N R, width]."""
        rows = max((len(t) for t in self.told.values()), default=1)
        told = {k: t.expand(rows, *t.shape[1:]) for k, t in self.told.items()}
        told = {k: t.repeat(len(timestep), *(1,) * (t.dim() - 1)) for k, t in told.items()}
        return self.model.conditioning(timestep.repeat_interleave(rows), **told)

    def bound(self) -> tuple[Any, ...]:
        """What makes the model another one than the network alone: tensors in a tree."""
        return self.prompts, self.told

    def unbound(self, batch: int) -> tuple[UNet2DCondition, dict[str, Any]]:
        """The model, and what its prompt makes it be given in each call. Raises ValueError for a batch that the prompts
        cannot be shared out to."""
        for prompt in self.prompts[:1]:
            _share(len(prompt.keys), batch)
        return self.model, {"prompts": self.prompts}

    def forward(self, x: Tensor, timestep: Tensor | None = None, conditioning: Tensor | None = None) -> Tensor:
        """As the model's. Raises ValueError as `unbound` does."""
        model, given = self.unbound(len(x))
        return model(x, timestep, conditioning=conditioning, **given, **self.told)


def _share(rows: int, batch: int) -> int:
    """How many samples in turn a row is for. Raises ValueError unless it is plain which: two rows are the two halves of
    a batch with guidance, other numbers would give a sample another row in a batch of another size."""
    each = max(1, rows)  # an empty batch has no rows
    if rows not in (1, 2, batch) or batch % each:
        raise ValueError(f"a batch of {batch} takes 1 row, 2 for its halves, or {batch}, not {rows}")
    return batch // each

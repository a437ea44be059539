"""diffusers' modules with their computations in ops, a family a file."""

from diffkern.integrations.modules import attention, flux, joint, norms, pixels, tokens, transformer, video
from diffkern.integrations.modules.base import Accelerated

PARTS: tuple[type[Accelerated], ...] = (
    pixels.Conv2d,
    pixels.GroupNorm,
    pixels.ResnetBlock2D,
    pixels.ResnetBlockCondNorm2D,
    pixels.Upsample2D,
    pixels.Downsample2D,
    tokens.Linear,
    tokens.GEGLU,
    tokens.SwiGLU,
    tokens.GELU,
    tokens.FeedForward,
    tokens.RMSNorm,
    tokens.Timesteps,
    attention.Attention,
    transformer.AdaLayerNormZero,
    transformer.BasicTransformerBlock,
    transformer.Transformer2DModel,
    norms.AdaLayerNormZeroSingle,
    norms.SD35AdaLayerNormZeroX,
    norms.AdaLayerNormContinuous,
    norms.AdaLayerNorm,
    joint.JointTransformerBlock,
    joint.SD3SingleTransformerBlock,
    flux.FluxAttention,
    flux.FluxTransformerBlock,
    flux.FluxSingleTransformerBlock,
    video.WanAttention,
    video.WanTransformerBlock,
    video.LTXAttention,
    video.LTXVideoTransformerBlock,
)

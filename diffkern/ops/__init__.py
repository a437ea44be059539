"""The ops, one file each. Importing this registers them all; a new op adds one line here."""

from diffkern.ops.add_noise import add_noise
from diffkern.ops.attention import attention
from diffkern.ops.conv2d import conv2d
from diffkern.ops.conv2d_moments import conv2d_moments
from diffkern.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from diffkern.ops.group_norm_silu import group_norm_silu
from diffkern.ops.group_norm_silu_backward import group_norm_silu_backward
from diffkern.ops.layer_norm_modulate import layer_norm_modulate
from diffkern.ops.layer_norm_modulate_backward import layer_norm_modulate_backward
from diffkern.ops.linear import linear
from diffkern.ops.qk_norm_rope import qk_norm_rope
from diffkern.ops.query_key_value import query_key_value
from diffkern.ops.randn import Draw, noise_keys, randn
from diffkern.ops.reparameterize import reparameterize
from diffkern.ops.rms_norm import rms_norm
from diffkern.ops.sampler_step import sampler_step
from diffkern.ops.timestep_embedding import timestep_embedding
from diffkern.ops.vlb_term import vlb_term

__all__ = [
    "Draw",
    "add_noise",
    "attention",
    "conv2d",
    "conv2d_moments",
    "gate_residual_norm_modulate",
    "group_norm_silu",
    "group_norm_silu_backward",
    "layer_norm_modulate",
    "layer_norm_modulate_backward",
    "linear",
    "noise_keys",
    "qk_norm_rope",
    "query_key_value",
    "randn",
    "reparameterize",
    "rms_norm",
    "sampler_step",
    "timestep_embedding",
    "vlb_term",
]

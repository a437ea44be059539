"""The ops, one file each. Importing this registers them all; a new op adds one line here."""

from diffkern.ops.add_noise import add_noise
from diffkern.ops.attention import attention
from diffkern.ops.conv2d import conv2d
from diffkern.ops.group_norm_silu import group_norm_silu
from diffkern.ops.group_norm_silu_backward import group_norm_silu_backward
from diffkern.ops.linear import linear
from diffkern.ops.randn import Draw, noise_keys, randn
from diffkern.ops.reparameterize import reparameterize
from diffkern.ops.sampler_step import sampler_step

__all__ = [
    "Draw",
    "add_noise",
    "attention",
    "conv2d",
    "group_norm_silu",
    "group_norm_silu_backward",
    "linear",
    "noise_keys",
    "randn",
    "reparameterize",
    "sampler_step",
]

"""diffkern: fused kernels to sample and to score diffusion models."""

from diffkern.models.bundle import Diffusion, bundled, load
from diffkern.models.folder import ModelError
from diffkern.models.unet import UNet2D
from diffkern.op import BackendError, explain, use_backend
from diffkern.ops import (
    Draw,
    add_noise,
    attention,
    conv2d,
    group_norm_silu,
    linear,
    noise_keys,
    randn,
    reparameterize,
    sampler_step,
)
from diffkern.packing import prepare
from diffkern.samplers import SAMPLERS, Row, Table, make_table
from diffkern.samplers.loop import Progress, sample
from diffkern.schedules import Schedule

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS",
    "BackendError",
    "Diffusion",
    "Draw",
    "ModelError",
    "Progress",
    "Row",
    "Schedule",
    "Table",
    "UNet2D",
    "add_noise",
    "attention",
    "bundled",
    "conv2d",
    "explain",
    "group_norm_silu",
    "linear",
    "load",
    "make_table",
    "noise_keys",
    "prepare",
    "randn",
    "reparameterize",
    "sample",
    "sampler_step",
    "use_backend",
]

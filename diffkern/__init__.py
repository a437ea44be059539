"""diffkern: fused kernels to sample and to score diffusion models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffkern.backend import BackendError, use_backend
from diffkern.choice import explain
from diffkern.graphs.calls import unrecorded
from diffkern.invariant import batch_invariant
from diffkern.models.autoencoder_kl import AutoencoderKL
from diffkern.models.bundle import Diffusion, bundled, load
from diffkern.models.dit import DiT
from diffkern.models.folder import ModelError
from diffkern.models.unet import UNet2D
from diffkern.models.unet_condition import UNet2DCondition
from diffkern.ops import (
    Draw,
    add_noise,
    attention,
    conv2d,
    conv2d_moments,
    gate_residual_norm_modulate,
    group_norm_silu,
    layer_norm_modulate,
    linear,
    noise_keys,
    qk_norm_rope,
    query_key_value,
    randn,
    reparameterize,
    rms_norm,
    sampler_step,
    timestep_embedding,
    vlb_term,
)
from diffkern.packing import prepare
from diffkern.samplers import SAMPLERS, Row, Table, make_table
from diffkern.samplers.loop import Progress, sample
from diffkern.schedules import Schedule

if TYPE_CHECKING:
    from diffkern import integrations, likelihood
    from diffkern.dataset.job import sample_dataset
    from diffkern.integrations.accelerate import accelerate, restore
    from diffkern.models.hvae import HierarchicalVAE
    from diffkern.models.vae import VAE

__version__ = "0.1.0"

# Read when they are first asked for: who samples does not wait for what scores, and for what knows diffusers.
_LATER = {
    "integrations": "",
    "likelihood": "",
    "accelerate": "diffkern.integrations.accelerate",
    "restore": "diffkern.integrations.accelerate",
    "HierarchicalVAE": "diffkern.models.hvae",
    "VAE": "diffkern.models.vae",
    "sample_dataset": "diffkern.dataset.job",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'diffkern' has no attribute {name!r}")
    module = _LATER[name]
    return getattr(importlib.import_module(module), name) if module else importlib.import_module(f"diffkern.{name}")


__all__ = [
    "SAMPLERS",
    "VAE",
    "AutoencoderKL",
    "BackendError",
    "DiT",
    "Diffusion",
    "Draw",
    "HierarchicalVAE",
    "ModelError",
    "Progress",
    "Row",
    "Schedule",
    "Table",
    "UNet2D",
    "UNet2DCondition",
    "accelerate",
    "add_noise",
    "attention",
    "batch_invariant",
    "bundled",
    "conv2d",
    "conv2d_moments",
    "explain",
    "gate_residual_norm_modulate",
    "group_norm_silu",
    "integrations",
    "layer_norm_modulate",
    "likelihood",
    "linear",
    "load",
    "make_table",
    "noise_keys",
    "prepare",
    "qk_norm_rope",
    "query_key_value",
    "randn",
    "reparameterize",
    "restore",
    "rms_norm",
    "sample",
    "sample_dataset",
    "sampler_step",
    "timestep_embedding",
    "unrecorded",
    "use_backend",
    "vlb_term",
]

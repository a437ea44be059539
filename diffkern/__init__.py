"""diffkern: fused kernels to sample and to score diffusion models."""

from diffkern.op import BackendError, explain, use_backend
from diffkern.ops import Draw, add_noise, group_norm_silu, noise_keys, randn, reparameterize, sampler_step

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Draw",
    "add_noise",
    "explain",
    "group_norm_silu",
    "noise_keys",
    "randn",
    "reparameterize",
    "sampler_step",
    "use_backend",
]

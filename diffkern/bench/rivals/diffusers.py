"""diffusers, as it is loaded, with its weights in channels_last, and after `diffkern.accelerate`."""

from __future__ import annotations

from diffkern.bench.networks import accelerated, as_loaded, by_diffusers, channels_last
from diffkern.bench.rivals import Rival, installed

RIVAL = Rival(
    installed("diffusers"),
    networks={
        "diffusers": by_diffusers(as_loaded),
        "diffusers, channels_last": by_diffusers(channels_last),
        "diffusers, accelerated": by_diffusers(accelerated),
    },
)

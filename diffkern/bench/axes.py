"""Along what cost is measured, and what is run there: the op or the network that shows an axis best, at sizes where
something may jump: powers of two and the numbers beside them, and channels that fill no vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffkern.bench.networks import CIFAR, DIT, VAE, Emoji, Network, network
from diffkern.models.bundle import ASSETS
from diffkern.op import OPS, Op


@dataclass(frozen=True)
class Curve:
    """A call that is run at several sizes: of an op, with the arguments that `args` makes for a size and a dtype; or of
    a network, which `network` gives for a size, always with the same weights.

    size: what a size counts. n: what the cost of a call is shared out over; of a size there are size^power. quick: the
    sizes that show whether it runs, none if that takes too long. linear: whether each n adds the same work."""

    axis: str
    name: str
    what: str
    size: str
    n: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    power: int = 1
    linear: bool = False
    op: Op | None = None
    args: Callable[[int, torch.dtype], tuple[Any, ...]] | None = None
    network: Callable[[int], Network] | None = None

    def count(self, size: int) -> int:
        return size**self.power


def _emoji(pictures: int) -> Network:
    def inputs() -> tuple[torch.Tensor, ...]:
        n = torch.arange(pictures)
        return torch.randn(pictures, 3, 32, 32), n * 999 // pictures, n % 10

    found, folder = network("", "UNet2DModel", {}, inputs), ASSETS / "emoji-32"
    return Network(
        "", lambda _: None, lambda _, *more: found.ours(folder, *more), lambda _, *more: found.theirs(folder, *more)
    )


def _run(steps: int) -> Network:
    class Run(Emoji):
        N, STEPS = 1, steps

    return Network("", lambda _: None, Run.ours, Run.theirs)


def _cifar(side: int) -> Network:
    return network("", "UNet2DModel", CIFAR, lambda: (torch.randn(1, 3, side, side), torch.tensor([500])))


def _vae(side: int) -> Network:
    return network("", "AutoencoderKL", VAE, lambda: (torch.randn(1, 4, side, side),), "decode")


def _dit(tokens: int) -> Network:
    side = 2 * round(tokens**0.5)
    args = torch.tensor([500]), torch.tensor([3])
    return network("", "DiTTransformer2DModel", DIT, lambda: (torch.randn(1, 4, side, side), *args))


def _conv2d(channels: int, dtype: torch.dtype) -> tuple[Any, ...]:
    from diffkern.testing import make

    x = make((2, channels, 32, 32), "cpu", dtype, "channels_last")
    weight = make((channels, channels, 3, 3), "cpu", dtype, "channels_last", seed=1) / (9 * channels) ** 0.5
    return x, weight, make((channels,), "cpu", dtype, seed=2)


def _group_norm_silu(channels: int, dtype: torch.dtype) -> tuple[Any, ...]:
    from diffkern.testing import make

    x = make((2, channels, 32, 32), "cpu", dtype, "channels_last")
    return x, 32, *(make((channels,), "cpu", dtype, seed=s) for s in (1, 2))


def _attention(tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    from diffkern.testing import make

    return tuple(make((1, tokens, 4, 64), "cpu", dtype, seed=s) for s in range(3))


CURVES = (
    Curve(
        "batch", "emoji-32", "emoji-32's UNet, one call, pictures of 32 x 32", "pictures", "pictures",
        (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 48, 64), (1, 2, 3, 4), linear=True,
        network=_emoji,
    ),
    Curve(
        "resolution", "CIFAR-10 UNet", "DDPM's UNet for CIFAR-10, one call, one picture", "pixels a side", "pixels",
        (16, 24, 32, 40, 48, 56, 64, 72, 96, 128), (16, 24, 32), 2, network=_cifar,
    ),
    Curve(
        "resolution", "VAE decoder", "Stable Diffusion 1.5's VAE, one latent decoded", "latent pixels a side",
        "latent pixels", (8, 12, 15, 16, 17, 20, 24), (), 2, network=_vae,
    ),
    Curve(
        "channels", "conv2d", "a convolution of 3 x 3, C to C channels, 2 pictures of 32 x 32", "channels",
        "pairs of channels", (8, 12, 16, 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 100, 112, 127, 128, 129, 160, 192, 255,
        256, 257, 320, 384, 511, 512, 513, 640), (8, 31, 32, 33, 64), 2, op=OPS["conv2d"], args=_conv2d,
    ),
    Curve(
        "channels", "group_norm_silu", "32 groups, 2 pictures of 32 x 32", "channels", "channels",
        (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 416, 480, 512, 544, 640, 736, 768, 896, 960, 1024, 1056,
        1280, 1920, 2560), (32, 96, 128, 160), linear=True, op=OPS["group_norm_silu"],
        args=_group_norm_silu,
    ),
    Curve(
        "sequence", "attention", "4 heads of 64 numbers, queries and keys alike", "tokens", "tokens",
        (16, 32, 64, 77, 96, 127, 128, 129, 192, 255, 256, 257, 320, 384, 511, 512, 513, 640, 768, 1023, 1024, 1025,
        1280, 1536, 2047, 2048, 2049, 3072, 4096), (64, 77, 127, 128, 129), op=OPS["attention"], args=_attention,
    ),
    Curve(
        "sequence", "DiT-S/2", "DiT-S/2, one call, one latent", "tokens", "tokens",
        (64, 81, 144, 256, 289, 400, 576, 1024), (16, 25, 36), network=_dit,
    ),
    Curve(
        "steps", "emoji-32, a run", "emoji-32, DPM-Solver++ 2M with guidance, one picture", "steps", "steps",
        (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50), (1, 2, 3), linear=True, network=_run,
    ),
)  # fmt: skip
AXES = tuple(dict.fromkeys(curve.axis for curve in CURVES))

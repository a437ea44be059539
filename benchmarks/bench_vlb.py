"""The full variational bound of held-out emoji under the bundled model: diffkern's, and what one would write today.

    python benchmarks/bench_vlb.py            # into benchmarks/results/<machine>/vlb-<dtype>.json
    python benchmarks/bench_vlb.py --images 4 --timesteps 8 --rounds 1 --no-record

Rivals, on the same weights as diffusers' UNet2DModel, with the bound in plain PyTorch: "plain PyTorch" fills batches
with the pairs (x_t, t) of all images, as diffkern does; "loop" takes a timestep of an image at a time, and is timed on
one image. All sum over every timestep of the schedule, in terms that are compared first, with the same noise.
A pair takes as long at any t, so the schedule has fewer timesteps than the model's 1000 by default.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import diffkern
from diffkern.bench import record
from diffkern.data import load_data
from diffkern.likelihood import vlb
from diffkern.models.bundle import ASSETS
from diffkern.schedules import cosine

Noise = Callable[[Tensor, Tensor], Tensor]
"""(columns [B], images [B]) -> noise [B, C, H, W]."""


class Plain:
    """The bound's formulas as in DDPM's and improved DDPM's code, for v prediction and the posterior's variance."""

    def __init__(self, model: Any, T: int, x: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        alpha_bar = cosine(T).alpha_t.square().to(x.device)
        before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        variance = beta * (1 - before) / (1 - alpha_bar)
        columns = {
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "mean_x0": before.sqrt() * beta / (1 - alpha_bar),
            "mean_x_t": (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar),
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
        }
        self.columns = {name: column.to(torch.float32) for name, column in columns.items()}
        self.model, self.x, self.labels, self.dtype = model, x, labels, dtype
        # the decoder twice, as diffkern takes it, then every step
        self.timesteps = torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(1, T)]).to(x.device)

    def terms(self, column: Tensor, image: Tensor, noise: Noise) -> Tensor:
        """Nats of each pair, float32 [B]."""
        t, x0 = self.timesteps[column], self.x[image]
        of = {name: values[t][:, None, None, None] for name, values in self.columns.items()}
        x_t = of["sqrt_alpha_bar"] * x0 + of["sqrt_one_minus_alpha_bar"] * noise(column, image)
        v = self.model(x_t.to(self.dtype), t, class_labels=self.labels[image], return_dict=False)[0].float()
        found = (of["sqrt_alpha_bar"] * x_t - of["sqrt_one_minus_alpha_bar"] * v).clamp(-1, 1)
        true_mean = of["mean_x0"] * x0 + of["mean_x_t"] * x_t
        mean = of["mean_x0"] * found + of["mean_x_t"] * x_t
        log_variance = of["log_variance"]
        kl = 0.5 * (-1 + log_variance - log_variance + 1 + (true_mean - mean).square() * torch.exp(-log_variance))
        scale, off = torch.exp(-0.5 * log_variance), x0 - found
        above, below = torch.special.ndtr(scale * (off + 1 / 255)), torch.special.ndtr(scale * (off - 1 / 255))
        mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
        nll = -mass.clamp(min=1e-12).log()
        return torch.where((t == 0)[:, None, None, None], nll, kl).flatten(1).sum(1)

    def batched(self, batch_size: int, noise: Noise) -> Tensor:
        """Terms of every image [n, T + 1], the pairs of all chained."""
        n, device = len(self.x), self.x.device
        pairs = torch.arange(n * len(self.timesteps), device=device).split(batch_size)
        return torch.cat([self.terms(p // n, p % n, noise) for p in pairs]).reshape(-1, n).T

    def loop(self, image: int, noise: Noise) -> Tensor:
        """Terms of one image [T + 1], a pair at a time."""
        which = torch.tensor([image], device=self.x.device)
        columns = torch.arange(len(self.timesteps), device=self.x.device)
        return torch.cat([self.terms(c[None], which, noise) for c in columns])


def fresh(x: Tensor) -> Noise:
    return lambda column, image: torch.randn(len(column), *x.shape[1:], device=x.device)


def counted(x: Tensor) -> Noise:
    """What `vlb` draws."""
    keys, first = diffkern.noise_keys(0, len(x), x.device), int(diffkern.Draw.BOUND)

    def noise(column: Tensor, image: Tensor) -> Tensor:
        drawn = [
            diffkern.randn(keys[i : i + 1], list(x.shape[1:]), first + c)
            for c, i in zip(column.tolist(), image.tolist(), strict=True)
        ]
        return torch.cat(drawn)

    return noise


def measure(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one dtype."""
    kind, device = getattr(torch, dtype), options.device
    diffusion = diffkern.load("emoji-32", dtype=kind, device=device)
    pictures = load_data("held-out", diffusion.model.sample_shape, options.images)
    x, T = pictures.images.to(device), options.timesteps
    assert pictures.labels is not None
    labels, schedule = pictures.labels.to(device), cosine(T, prediction="v", clip=1.0)
    theirs = diffusers.UNet2DModel.from_pretrained(ASSETS / "emoji-32", torch_dtype=kind).eval().to(device)
    plain = Plain(theirs, T, x, labels, kind)

    def ours() -> Tensor:
        batch = {"batch_size": options.batch_size, "progress": False}
        return vlb(diffusion.model, x, schedule, labels=labels, **batch).log_p

    scale = x[0].numel() * math.log(2)
    bits = {"diffkern": -ours() / scale}
    for name, found in {
        "plain PyTorch": plain.batched(options.batch_size, counted(x)),
        "loop": plain.loop(0, counted(x))[None],
    }.items():
        alpha_bar = schedule.alpha_t[-1].item() ** 2
        squares = x[: len(found)].double().square().flatten(1).sum(1).cpu()
        prior = 0.5 * (alpha_bar * squares + x[0].numel() * (-alpha_bar - math.log1p(-alpha_bar)))
        bits[name] = (prior + found[:, :2].double().mean(1).cpu() + found[:, 2:].double().sum(1).cpu()) / scale
        error = (bits[name] / bits["diffkern"][: len(found)] - 1).abs().max().item()
        # A network in bfloat16 has three digits; a bound adds up squares of its errors.
        allowed = 1e-3 if dtype == "float32" else 5e-2
        if not error <= allowed:
            raise SystemExit(f"{name} finds another bound, off by {error:.2g} of it: nothing is timed")

    runs: dict[str, Callable[[], object]] = {
        "diffkern": ours,
        "plain PyTorch": lambda: plain.batched(options.batch_size, fresh(x)),
        "loop": lambda: plain.loop(0, fresh(x)),
    }
    seconds = record.interleave(runs, options.rounds)
    pairs = {name: (T + 1) * (1 if name == "loop" else len(x)) for name in runs}
    rows = {}
    for name, taken in seconds.items():
        each = [1e3 * s / pairs[name] for s in taken]
        ours_each = [1e3 * s / pairs["diffkern"] for s in seconds["diffkern"]]
        rows[name] = {
            "ms a pair": record.spread(each),
            "pairs": pairs[name],
            "bits/dim of the first": float(f"{bits[name][0].item():.5g}"),
            "diffkern is faster by": record.ratio(each, ours_each),
        }
        print(f"  {name:<16}{rows[name]['ms a pair']} ms a pair, faster by {rows[name]['diffkern is faster by']}")
    return {
        "what": f"emoji-32, the full bound of {len(x)} held-out emoji over {T} timesteps, "
        f"{options.batch_size} pairs a batch; the loop on one emoji",
        "dtype": dtype,
        "images": len(x),
        "timesteps": T,
        "variants": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=32, help="of the schedule, 2 or more")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the records")
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    for dtype in options.dtypes.split(","):
        print(dtype, flush=True)
        results = measure(dtype, options)
        if not options.no_record:
            print(record.write(f"vlb-{dtype}", options.device, results, options.out), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()

"""Train a VAE on scikit-learn's handwritten digits and bound how likely it finds them, with one level of latents or a
hierarchy of them.

    python examples/train_vae.py --levels 3 --out vae.png

The digits are 8x8 pixels of 17 grey levels: knowing nothing of them costs log2(17) = 4.09 bits a pixel. Every sixth is
held out. Prints the evidence lower bound and the importance-weighted one, of both parts, and writes a picture of
samples and reconstructions. All follows from the seed."""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from diffkern import VAE, HierarchicalVAE, files, noise_keys, pictures
from diffkern.data import load_data
from diffkern.likelihood import Likelihood, elbo, iwae
from diffkern.models.vae import VAEConfig

SHAPE = (1, 8, 8)
GREY_LEVELS = 17
LATENTS = 16  # of the lowest level; each above has 3/4 of those below
DROPOUT = 0.1
BATCH = 128
LEARNING_RATE = 2e-3
# Part of the steps in which the weight of the KL rises to 1: else the higher levels of a hierarchy stay unused.
KL_WARM_UP, KL_WARM_UP_OF_MANY = 0.2, 0.5
SIDE = 12  # digits in a row and in a column of each half of the picture
SCALE, MARGIN = 5, 20  # of the picture: how wide a pixel is drawn, and what is left for a line of text


def digits() -> tuple[Tensor, Tensor]:
    """What to train with and what is held out: float32 [n, 1, 8, 8] on 17 levels from -1 to 1."""
    x = (load_data("digits", SHAPE).images * 8).round() / 8  # as 8-bit pixels they are a little off
    held_out = torch.arange(len(x)) % 6 == 5
    return x[~held_out], x[held_out]


def build(levels: int, seed: int) -> VAE:
    torch.manual_seed(seed)  # of the weights and the dropout; noise has keys of its own
    dims = tuple(max(2, round(LATENTS * 0.75**t)) for t in range(levels))
    config = VAEConfig(shape=SHAPE, latent_dims=dims, dropout=DROPOUT, pixel_levels=GREY_LEVELS)
    return VAE(config) if levels == 1 else HierarchicalVAE(config)


def train(model: VAE, x: Tensor, steps: int, seed: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    order = torch.Generator().manual_seed(seed)
    warm_up = steps * (KL_WARM_UP if len(model.config.latent_dims) == 1 else KL_WARM_UP_OF_MANY)
    model.train()
    bar = tqdm(range(steps), unit="step", mininterval=1)
    for step in bar:
        which = torch.randint(len(x), (BATCH,), generator=order)
        terms = model(x[which], noise_keys(seed, range(step * BATCH, (step + 1) * BATCH)))
        kl_weight = min(1.0, (step + 1) / max(1.0, warm_up))
        loss = (terms.reconstruction + kl_weight * terms.kl.sum(1)).mean()
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * cosine * min(1.0, (step + 1) / 100)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimiser.step()
        if step % 50 == 0:
            bar.set_postfix(elbo=f"{terms.elbo.mean().item():.1f}")
    model.eval()


def line(name: str, bound: Likelihood) -> str:
    bits, error = bound.average()
    nats = bound.dims * math.log(2)
    return f"{name:26} {-bits * nats:8.2f} ± {error * nats:.2f} nats {bits:8.3f} ± {error:.3f} bits/dim"


def draw(model: VAE, x: Tensor, seed: int) -> Image.Image:
    """Samples on the left. On the right digits, and below each what z_1, ..., z_T keep of it."""
    levels = len(model.config.latent_dims)
    latents = "z_1" if levels == 1 else f"z_1 to z_{levels}"
    rows: list[Tensor] = []
    for row in x[: SIDE * (SIDE // (levels + 1))].split(SIDE):
        rows += [row, *(model.reconstruct(row, level) for level in range(1, levels + 1))]
    panels = {
        "samples": model.sample(SIDE * SIDE, seed, mean=True),
        f"held-out digits, each above what is made of its {latents}": torch.cat(rows),
    }
    # Dark on light, with space around.
    sheets = [pictures.grid(pictures.to_uint8(-shown), SCALE, gap=SCALE) for shown in panels.values()]
    side = sheets[0].width
    whole = Image.new("RGB", (2 * side + MARGIN, side + MARGIN), "white")
    for i, (title, sheet) in enumerate(zip(panels, sheets, strict=True)):
        whole.paste(sheet, (i * (side + MARGIN), MARGIN))
        ImageDraw.Draw(whole).text((i * (side + MARGIN) + SCALE, SCALE), title, "black")
    return whole


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _from(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return read


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = _Parser(prog="train_vae.py", description="Train a VAE on 8x8 digits and bound how likely it finds them.")
    p.add_argument("--levels", type=_from(1, SIDE - 1), default=1, help="of latents (default: %(default)s)")
    p.add_argument("--steps", type=_from(1, 10**6), default=4000, help="of training (default: %(default)s)")
    p.add_argument("--draws", type=_from(2, 10**6), default=100, help="for the bound of a digit (default: %(default)s)")
    p.add_argument("--seed", type=_from(0, 2**63 - 1), default=0, help="(default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("vae.png"), help="the picture (default: %(default)s)")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.out.suffix.lower() != ".png" or args.out.is_dir():
            raise ValueError(f"cannot write {args.out}: give a name that ends in .png, and is no folder")
        files.check_writable(args.out)
        seen, held_out = digits()
        model = build(args.levels, args.seed)
        started = time.monotonic()
        train(model, seen, args.steps, args.seed)
        for name, x in (("train", seen), ("held-out", held_out)):
            evidence = elbo(model, x, samples=args.draws, seed=args.seed)
            print(line(f"{name} ELBO", evidence))
            print(line(f"{name} IWAE, k = {args.draws}", iwae(model, x, args.draws, seed=args.seed)))
        parts = [f"reconstruction {evidence.terms['reconstruction'].mean():.1f}"]
        parts += [f"KL of z_{t} {kl:.1f}" for t, kl in enumerate(evidence.terms["kl"].mean(0).tolist(), start=1)]
        print(f"held-out ELBO in nats: {', '.join(parts)}; {time.monotonic() - started:.0f} s in all")
        buffer = io.BytesIO()
        draw(model, held_out, args.seed).save(buffer, "png")
        files.replace(args.out, buffer.getvalue())
    except (OSError, ValueError) as e:
        # An OSError's own text begins with its number.
        print(f"train_vae.py: {f'{e.filename}: {e.strerror}' if isinstance(e, OSError) else e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

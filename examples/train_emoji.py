"""Train the 32x32 emoji model that comes with diffkern, `diffkern/assets/emoji-32`, on a CPU in an afternoon.

    python examples/train_emoji.py runs/emoji --export my-emoji
    diffkern sample --model my-emoji --label food

A run can be stopped at any time: the same command goes on from its last checkpoint. The learning rate is constant until
the last part of --steps (--decay); up to there a run can be made shorter or longer by giving other --steps."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from cpu_training import Muon, Workers
from torch import Tensor, nn
from tqdm import tqdm

from diffkern import pictures
from diffkern.data.emoji import EMOJI_TEST, FONT, LABELS, NULL_LABEL, DataError, EmojiSet, load_emoji
from diffkern.models.folder import ModelError
from diffkern.models.unet import UNet2D, UNet2DConfig
from diffkern.ops.randn import noise_keys
from diffkern.samplers import make_table
from diffkern.samplers.loop import sample
from diffkern.scheduler_config import from_diffusers_config
from diffkern.schedules import Schedule

# Most of the weights are at 8x8 and 4x4, where they cost the least: a CPU spends its time at 32x32, kept narrow.
MODEL = UNet2DConfig(
    sample_size=32,
    block_out_channels=(32, 64, 128, 192),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    attention_head_dim=32,
    norm_num_groups=16,
    num_class_embeds=len(LABELS) + 1,
)
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "timestep_spacing": "trailing",
}
LABEL_DROPOUT = 0.1  # how often the label is hidden: what guidance is learnt from
EVALUATION_TIMES = 4  # noise levels a picture, in the losses that the log compares


@dataclass
class Run:
    """What a checkpoint holds. Nothing random is in it: all of that follows from the seed and the step."""

    model: UNet2D
    ema: UNet2D
    optimisers: tuple[Muon, torch.optim.AdamW]
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
        }
        scratch = path.with_suffix(".writing")
        torch.save(state, scratch)
        os.replace(scratch, path)  # a run that is killed here keeps the checkpoint it had

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
            raise DataError(f"{path} is damaged, or a checkpoint of something else: remove it to start anew") from None

    def update_ema(self, decay: float) -> None:
        decay = min(decay, (1 + self.step) / (10 + self.step))  # so that the first weights are soon forgotten
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                e.lerp_(p, 1 - decay)


def make_optimisers(model: nn.Module, workers: Workers, lr: float) -> tuple[Muon, torch.optim.AdamW]:
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        outer = p.ndim < 2 or name.startswith(("conv_in.", "conv_out.", "class_embedding."))
        (others if outer else hidden).append(p)
    adamw = torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.99), weight_decay=0.0)
    return Muon(hidden, workers, lr), adamw


def lr_factor(step: int, args: argparse.Namespace) -> float:
    """Up over --warmup steps, constant, down to zero over the last --decay of --steps."""
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / max(1.0, args.decay * args.steps))


def choose(draws: range, labels: Tensor, seed: int) -> Tensor:
    """Which pictures the given draws take, out of all since the beginning: the labels in turn, so that a label with few
    pictures is learnt as well as one with many, and each label's pictures shuffled anew when all were seen."""
    groups = [np.flatnonzero(labels == label) for label in labels.unique()]

    @functools.cache
    def order(group: int, pass_: int) -> np.ndarray:
        return np.random.default_rng((seed, group, pass_)).permutation(groups[group])

    def one(draw: int) -> int:
        turn, group = divmod(draw, len(groups))
        pass_, place = divmod(turn, len(groups[group]))
        return int(order(group, pass_)[place])

    return torch.tensor([one(draw) for draw in draws])


def make_batch(step: int, data: EmojiSet, schedule: Schedule, args: argparse.Namespace) -> tuple[Tensor, ...]:
    """Noisy pictures, timesteps, labels and the targets of a step."""
    draws = range(step * args.batch, (step + 1) * args.batch)
    index = choose(draws, data.labels, args.seed)
    x, labels = data.images[index], data.labels[index]

    g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    labels[torch.rand(args.batch, generator=g) < LABEL_DROPOUT] = NULL_LABEL
    # One timestep out of each of --batch equal ranges: the loss is less noisy than with free draws.
    ranges = torch.randperm(args.batch, generator=g)  # in any order: the labels come in a fixed one
    t = ((ranges + torch.rand(args.batch, generator=g)) / args.batch * len(schedule)).long()
    noisy, noise = schedule.add_noise(x, t, noise_keys(args.seed, draws), return_noise=True)
    return noisy, t, labels, schedule.target(x, noise, t)


def evaluate(model: UNet2D, workers: Workers, schedule: Schedule, data: EmojiSet) -> float:
    """The mean loss at timesteps and noise that are the same in each call."""
    g = torch.Generator().manual_seed(0)
    losses: list[float] = []

    @torch.no_grad()
    def work(_: nn.Module, part: tuple[Tensor, ...]) -> None:
        noisy, t, labels, target = part
        losses.append(F.mse_loss(model(noisy, t, labels), target, reduction="sum").item())

    n = len(data.images)
    for k in range(EVALUATION_TIMES):
        t = ((k + torch.rand(n, generator=g)) / EVALUATION_TIMES * len(schedule)).long()
        keys = noise_keys(0, range(k * n, (k + 1) * n))
        noisy, noise = schedule.add_noise(data.images, t, keys, return_noise=True)
        batch = (noisy, t, data.labels, schedule.target(data.images, noise, t))
        workers.each(work, zip(*(a.split(workers.part) for a in batch), strict=True))
    return sum(losses) / (EVALUATION_TIMES * data.images.numel())


def draw(model: UNet2D, workers: Workers, schedule: Schedule, guidance: float, each: int = len(LABELS)) -> Tensor:
    """`each` pictures of every label, label by label."""
    table = make_table("dpmpp_2m", schedule, steps=25)
    out: dict[int, Tensor] = {}

    def work(_: nn.Module, label: int) -> None:
        ids = range(label * each, (label + 1) * each)
        given: dict[str, Any] = {"labels": label, "null_label": NULL_LABEL, "guidance": guidance}
        out[label] = sample(model, table, sample_ids=ids, progress=False, **given)

    workers.each(work, range(len(LABELS)))
    return torch.cat([out[label] for label in range(len(LABELS))])


def export(model: UNet2D, folder: Path) -> None:
    """Write what `diffkern.load` and diffusers read."""
    model.save(folder, torch.float16)
    for name, value in (
        ("scheduler_config", SCHEDULER),
        ("labels", {"labels": LABELS, "null_label": NULL_LABEL}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def train(args: argparse.Namespace, data: EmojiSet) -> Run:
    seen, held_out = data.split()
    compared = seen.thin(len(held_out.images))
    schedule = from_diffusers_config(SCHEDULER)
    torch.manual_seed(args.seed)
    model = UNet2D(MODEL) if args.start is None else UNet2D.from_folder(args.start).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    workers = Workers(model, args.workers)
    run = Run(model, ema, make_optimisers(model, workers, args.lr))
    checkpoint = args.folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)

    def log(**entry: float) -> None:
        with open(args.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **entry}) + "\n")

    losses: list[float] = []
    started = time.monotonic() - run.seconds
    bar = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step", mininterval=5)
    for step in bar:
        *inputs, target = make_batch(step, seen, schedule, args)
        losses.append(workers.gradients(tuple(inputs), target))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, share in zip(run.optimisers, (1.0, 0.5), strict=True):
            optimiser.param_groups[0]["lr"] = args.lr * share * lr_factor(step, args)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        run.step = step + 1
        run.update_ema(args.ema)
        run.seconds = time.monotonic() - started

        last = run.step == args.steps
        if run.step % args.log_every == 0 or last:
            log(loss=sum(losses) / len(losses), lr=args.lr * lr_factor(step, args), seconds=round(run.seconds))
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
            losses.clear()
        if run.step % args.save_every == 0 or last:
            run.save(checkpoint)
        if run.step % args.sample_every == 0 or last:
            log(
                train_loss=evaluate(ema, workers, schedule, compared),
                held_out_loss=evaluate(ema, workers, schedule, held_out),
            )
            rows = pictures.to_uint8(draw(ema, workers, schedule, args.guidance))
            pictures.grid(rows, scale=2).save(args.folder / f"step-{run.step:06d}.png")
    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = _Parser(description="Train the emoji model; a run that was stopped goes on.")
    p.add_argument("folder", type=Path, help="of the run: checkpoint, log and pictures")
    p.add_argument("--export", type=Path, metavar="FOLDER", help="write the trained model there, for diffkern.load")
    p.add_argument("--start", type=Path, metavar="FOLDER", help="begin with that model's weights, not with random ones")
    p.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf, with bitmaps")
    p.add_argument("--emoji-test", type=Path, default=EMOJI_TEST, help="Unicode's emoji-test.txt")
    p.add_argument("--steps", type=_at_least_one, default=7500, help="(default: %(default)s)")
    p.add_argument("--batch", type=_at_least_one, default=48, help="(default: %(default)s)")
    p.add_argument("--lr", type=float, default=2e-3, help="of Muon; AdamW has half (default: %(default)s)")
    p.add_argument("--warmup", type=_at_least_one, default=100, help="steps (default: %(default)s)")
    p.add_argument("--decay", type=float, default=0.3, help="part of the steps (default: %(default)s)")
    p.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights (default: %(default)s)")
    p.add_argument("--guidance", type=float, default=3.0, help="of the pictures of the log (default: %(default)s)")
    p.add_argument("--log-every", type=_at_least_one, default=25, metavar="STEPS")
    p.add_argument("--save-every", type=_at_least_one, default=100, metavar="STEPS")
    p.add_argument("--sample-every", type=_at_least_one, default=1000, metavar="STEPS")
    p.add_argument("--workers", type=_at_least_one, default=os.cpu_count() or 1, help="threads (default: all cores)")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        data = load_emoji(args.font, args.emoji_test)
        args.folder.mkdir(parents=True, exist_ok=True)
        run = train(args, data)
        if args.export is not None:
            export(run.ema, args.export)
    except (DataError, ModelError, OSError) as e:
        # An OSError's own text begins with its number.
        print(f"train_emoji.py: {f'{e.filename}: {e.strerror}' if isinstance(e, OSError) else e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

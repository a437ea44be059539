"""The losses of the model card: of the bundled emoji model, on training pictures and on the held-out ones.

    python examples/evaluate_emoji.py

Timesteps and noise come from a fixed seed, so that the figures are the same each time."""

from __future__ import annotations

import json
import os
import sys

from cpu_training import Workers
from train_emoji import evaluate

import diffkern
from diffkern.data.emoji import DataError, load_emoji


def main() -> int:
    emoji = diffkern.load("emoji-32")
    try:
        seen, held_out = load_emoji().split()
    except DataError as e:
        print(f"evaluate_emoji.py: {e}", file=sys.stderr)
        return 2
    workers = Workers(emoji.model, os.cpu_count() or 1)
    sets = {"train_v_loss": seen.thin(len(held_out.images)), "held_out_v_loss": held_out}
    print(json.dumps({k: round(evaluate(emoji.model, workers, emoji.schedule, data), 4) for k, data in sets.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

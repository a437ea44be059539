"""Pictures to train with and to score, none of which is downloaded."""

from __future__ import annotations

from pathlib import Path

from diffkern.data import emoji, sets
from diffkern.data.sets import DataError, Pictures, Shape

__all__ = ["SETS", "DataError", "Pictures", "load_data"]

SETS = ("held-out", "train", "digits", "noise")
"""The sets that have a name; anything else is a folder of PNGs."""
NOISE = 64  # pictures of noise, unless told how many


def load_data(source: str | Path, shape: Shape, n: int | None = None) -> Pictures:
    """Pictures to score, in the size and channels of a model.

    source: "held-out" or "train", the two parts of the emoji set; "digits", scikit-learn's, scaled up; "noise", uniform
    random pixels; or a folder of PNGs. shape: (C, H, W) of the model's samples. n: how many, evenly from all over the
    set; all of them if it has no more, the default (64 of noise). The pixels are the same on every machine, those of
    the emoji as far as its font and Pillow are.

    Raises DataError, a ValueError of one sentence, if there are none such, or they do not fit the model."""
    if n is not None and n < 1:
        raise DataError(f"n must be at least 1, not {n}")
    if len(shape) != 3 or shape[0] not in (1, 3):
        what = " x ".join(map(str, shape))
        raise DataError(f"the model's samples are {what}, and no pictures of 1 or 3 channels: it may be one of latents")
    match str(source):
        case "held-out" | "train":
            found = _emoji(str(source), shape)
        case "digits":
            found = sets.digits(shape)
        case "noise":
            found = sets.noise(shape, n or NOISE)
        case _ if Path(source).is_dir():
            found = sets.folder(Path(source), shape, str(source))
        case _:
            raise DataError(f"no data is named {str(source)!r}: give a folder of PNGs or one of {', '.join(SETS)}")
    return found if n is None else found.thin(n)


def _emoji(part: str, shape: Shape) -> Pictures:
    channels, height, width = shape
    if channels != 3 or height != width:
        raise DataError(f"the emoji are square and in colour: the model's pictures are {channels} x {height} x {width}")
    train, held_out = emoji.load_emoji(size=height).split()
    chosen = train if part == "train" else held_out
    return Pictures(part, chosen.images, chosen.names, chosen.labels, emoji.LABELS)

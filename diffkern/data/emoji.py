"""Noto Color Emoji as a small set of labelled pictures: 32x32 RGB, the groups of Unicode's list as labels.

Made from a file each of the Debian packages fonts-noto-color-emoji and unicode-data; nothing is downloaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from diffkern.data.sets import DataError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")

# In the order of the list. Its last group, "Component", is skin tones and hair, no pictures.
LABELS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
NULL_LABEL = len(LABELS)  # stands for any label: what classifier-free guidance needs

STRIKE = 109  # the one size that the font has bitmaps in
SKIN_TONES = range(0x1F3FB, 0x1F400)


class Emoji(NamedTuple):
    """An entry of Unicode's list: its characters, the number of its group in LABELS, what it is called there."""

    text: str
    label: int
    name: str


@dataclass(frozen=True)
class EmojiSet:
    """images: float32 [n, 3, size, size] on [-1, 1]. labels: int64 [n]. held_out: bool [n]. names: n, as in Unicode's
    list."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    names: tuple[str, ...]

    def take(self, which: Tensor) -> EmojiSet:
        """Some of them. which: bool [n], or int64 [m] in any order."""
        names = tuple(self.names[i] for i in torch.arange(len(self.names))[which].tolist())
        return EmojiSet(self.images[which], self.labels[which], self.held_out[which], names)

    def split(self) -> tuple[EmojiSet, EmojiSet]:
        """What to train with, and what is held out."""
        return self.take(~self.held_out), self.take(self.held_out)

    def thin(self, n: int) -> EmojiSet:
        """n pictures from all over the set."""
        return self.take(torch.linspace(0, len(self.images) - 1, n).long())


def read_list(path: Path) -> list[Emoji]:
    """Each fully qualified emoji without a skin tone."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        raise DataError(f"cannot read {path}: it should be Unicode's emoji-test.txt (Debian: unicode-data)") from None
    found: list[Emoji] = []
    label: int | None = None
    for line in lines:
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
            label = LABELS.index(group) if group in LABELS else None
        elif label is not None and "; fully-qualified" in line:
            points = [int(p, 16) for p in line.split(";")[0].split()]
            if not any(p in SKIN_TONES for p in points):
                # the comment of a line is the emoji, the version that added it, and its name
                name = line.partition("#")[2].split(maxsplit=2)[-1]
                found.append(Emoji("".join(map(chr, points)), label, name))
    if not found:
        raise DataError(f"{path} lists no emoji: it should be Unicode's emoji-test.txt (Debian: unicode-data)")
    return found


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise DataError("this Pillow was built without raqm, which joins the parts of a sequence into one glyph")
    try:
        return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as e:
        wanted = "Noto Color Emoji with bitmaps (Debian: fonts-noto-color-emoji)"
        raise DataError(f"cannot use {path}: {e}; it should be {wanted}") from None


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """An emoji on a white square, in the font's own size; None if the font has no one glyph for it."""
    side = round(font.getlength("\N{GRINNING FACE}"))
    # What the font does not join comes out as glyphs side by side, wider than one.
    if round(font.getlength(text)) != side:
        return None
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        return None
    canvas = Image.new("RGB", (side, side), "white")
    place = ((side - right - left) / 2, (side - bottom - top) / 2)  # centred; no glyph is larger than the square
    ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
    return canvas


def is_held_out(text: str) -> bool:
    """A fixed tenth, by the characters alone: a newer list adds to it and moves none."""
    return hashlib.sha256(text.encode()).digest()[0] * 10 // 256 == 0


def load_emoji(font_path: Path = FONT, list_path: Path = EMOJI_TEST, size: int = 32) -> EmojiSet:
    """Render the set, in some seconds. Raises DataError."""
    emoji = read_list(list_path)
    font = open_font(font_path)
    seen: set[bytes] = set()
    arrays, labels, held_out, names = [], [], [], []
    for text, label, name in emoji:
        picture = render(text, font)
        # Some sequences are drawn like another: that picture is kept once.
        if picture is None or (pixels := picture.tobytes()) in seen or picture.getcolors(1) is not None:
            continue
        seen.add(pixels)
        arrays.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)))
        labels.append(label)
        held_out.append(is_held_out(text))
        names.append(name)
    if not arrays:
        raise DataError(f"{font_path} has no picture of any emoji in {list_path}")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    return EmojiSet(images, torch.tensor(labels), torch.tensor(held_out), tuple(names))

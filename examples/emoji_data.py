"""Noto Color Emoji as a small labelled picture set: 32x32 RGB, the Unicode groups as labels.

The pictures come from two files of the Debian packages ``fonts-noto-color-emoji`` and
``unicode-data``; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")

# The groups of emoji-test.txt in its own order; "Component" (bare skin tones, hair) is not a picture.
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
NULL_LABEL = len(LABELS)  # "no label", for classifier-free guidance

STRIKE = 109  # the only bitmap size in the font
SKIN_TONES = range(0x1F3FB, 0x1F400)


class DataError(Exception):
    """The pictures cannot be made; the message says why in one sentence."""


@dataclass(frozen=True)
class EmojiSet:
    """``images`` are (N, 3, size, size) in [-1, 1]; ``names`` are the CLDR short names."""

    images: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]
    held_out: torch.Tensor

    def split(self, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        keep = self.held_out if held_out else ~self.held_out
        return self.images[keep], self.labels[keep]


def read_list(path: Path) -> list[tuple[str, int, str]]:
    """(characters, label, name) of each fully qualified emoji without a skin tone."""
    if not path.is_file():
        raise DataError(f"no emoji list at {path} (Debian package unicode-data)")
    found: list[tuple[str, int, str]] = []
    label: int | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
            label = LABELS.index(group) if group in LABELS else None
            continue
        if label is None or "; fully-qualified" not in line:
            continue
        points = [int(p, 16) for p in line.split(";")[0].split()]
        if any(p in SKIN_TONES for p in points):
            continue
        # "... # <emoji> E1.0 grinning face"
        name = line.split("#", 1)[1].split(maxsplit=2)[2]
        found.append(("".join(map(chr, points)), label, name))
    if not found:
        raise DataError(f"{path} lists no emoji")
    return found


def render(text: str, font: ImageFont.FreeTypeFont, advance: float) -> Image.Image | None:
    """One emoji at the strike size on a white square, or None if the font has no single glyph for it."""
    # A sequence the font does not join comes out as several glyphs side by side: wider than one.
    if round(font.getlength(text)) != round(advance):
        return None
    side = round(advance)
    canvas = Image.new("RGB", (side, side), "white")
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        return None
    # Centre the glyph's box: all strikes are 136x128, so this never crops.
    x, y = (side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top
    ImageDraw.Draw(canvas).text((x, y), text, font=font, embedded_color=True)
    return canvas


def is_held_out(text: str) -> bool:
    """A fixed tenth, chosen by the code points alone, so that a newer list does not move old members."""
    return hashlib.sha256(text.encode("utf-8")).digest()[0] * 10 // 256 == 0


def load(font_path: Path = FONT, list_path: Path = EMOJI_TEST, size: int = 32) -> EmojiSet:
    """Render the whole set; takes a few seconds."""
    if not features.check("raqm"):
        raise DataError("this Pillow was built without raqm, which the joined emoji need")
    emoji = read_list(list_path)
    if not font_path.is_file():
        raise DataError(f"no font at {font_path} (Debian package fonts-noto-color-emoji)")
    try:
        font = ImageFont.truetype(str(font_path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise DataError(f"{font_path} has no bitmaps of size {STRIKE}: {error}") from error
    advance = font.getlength("\N{GRINNING FACE}")

    seen: set[bytes] = set()
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    held_out: list[bool] = []
    blank = Image.new("RGB", (round(advance), round(advance)), "white").tobytes()
    for text, label, name in emoji:
        picture = render(text, font, advance)
        if picture is None or picture.tobytes() == blank:
            continue
        if picture.tobytes() in seen:  # e.g. a gendered sequence drawn like its base
            continue
        seen.add(picture.tobytes())
        small = picture.resize((size, size), Image.Resampling.BOX if size == STRIKE else Image.Resampling.LANCZOS)
        arrays.append(np.asarray(small))
        labels.append(label)
        names.append(name)
        held_out.append(is_held_out(text))
    if not arrays:
        raise DataError(f"{font_path} draws none of the emoji in {list_path}")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    return EmojiSet(images, torch.tensor(labels), tuple(names), torch.tensor(held_out))

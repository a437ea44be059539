"""Pictures to score, in the size and channels of a model: a folder of PNGs, scikit-learn's digits, pure noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkern.ops.randn import Draw, noise_keys, philox

Shape = Sequence[int]
"""(C, H, W) of one picture."""


class DataError(ValueError):
    """Something given cannot be used. The message is one sentence that says what and why."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """n pictures of 8-bit pixels. name: of the set. images: float32 [n, C, H, W] on [-1, 1], the 256 levels from -1 in
    steps of 2/255. names: of each picture. labels: int64 [n], numbers in label_names, or None if they have none."""

    name: str
    images: Tensor
    names: tuple[str, ...]
    labels: Tensor | None = None
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def thin(self, n: int) -> Pictures:
        """n of them, evenly from all over the set; all of them if there are no more."""
        if n >= len(self):
            return self
        which = torch.linspace(0, len(self) - 1, n, dtype=torch.float64).long()
        labels = None if self.labels is None else self.labels[which]
        names = tuple(self.names[i] for i in which.tolist())
        return Pictures(self.name, self.images[which], names, labels, self.label_names)

    def digest(self) -> str:
        """What tells these pixels from others: a SHA-256."""
        data = hashlib.sha256(str(tuple(self.images.shape)).encode())
        data.update(self.images.contiguous().numpy().tobytes())
        return data.hexdigest()


def from_uint8(pixels: np.ndarray) -> Tensor:
    """uint8 [n, H, W, C] -> float32 [n, C, H, W] on [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def folder(path: Path, shape: Shape, name: str) -> Pictures:
    """Every .png of a folder, by name. A picture with an alpha channel lies on white; a grey one may be given to a
    model of colours. Raises DataError, naming the file, for one that does not fit the model."""
    try:
        files = sorted(f for f in path.iterdir() if f.suffix.lower() == ".png" and f.is_file())
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
    if not files:
        raise DataError(f"{path} has no picture whose name ends in .png")
    pixels = np.stack([_read(file, shape) for file in files])
    return Pictures(name, from_uint8(pixels), tuple(f.stem for f in files))


def _read(file: Path, shape: Shape) -> np.ndarray:
    channels, height, width = shape
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            if picture.size != (width, height):  # before a pixel is read: a picture may claim any size
                size = f"{picture.width} x {picture.height}"
                raise DataError(f"{file} is {size} pixels: the model's pictures are {width} x {height}")
            if picture.mode.startswith(("I", "F")):
                raise DataError(f"{file} has more than 8 bits a channel: 8 are what is scored")
            rgba = picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{file} is no PNG, or a damaged one") from None
    white = Image.new("RGBA", rgba.size, "white")
    rgb = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    if channels == 3:
        return rgb
    if (rgb != rgb[..., :1]).any():
        raise DataError(f"{file} has colours: the model's pictures are grey")
    return rgb[..., :1]


def digits(shape: Shape) -> Pictures:
    """scikit-learn's 1797 handwritten digits, light on dark. Their 8x8 pixels of 17 grey levels become 8-bit (level
    k as round(255 k / 16)), repeated up to the model's size, in equal channels. Raises DataError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install 'diffkern[digits]'") from None
    channels, height, width = shape
    grey = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)  # [n, 8, 8]
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    pixels = np.repeat(grey[:, rows][:, :, columns, None], channels, axis=-1)
    return Pictures("digits", from_uint8(pixels), tuple(f"digit {i}" for i in range(len(pixels))))


def noise(shape: Shape, n: int) -> Pictures:
    """n pictures of independent, uniform pixels: 8 bits each, log2 p(x) / D = -8 under the law that they are drawn
    from. From the counter that all noise comes from: picture i is always the same."""
    numbers = prod(shape)
    seed, sample = noise_keys(0, n).split(1, dim=1)
    block = torch.arange((numbers + 3) // 4)[None]
    words = philox((seed, seed), (block, torch.full_like(seed, int(Draw.SAMPLING)), sample, torch.zeros_like(seed)))
    levels = (torch.stack(words, dim=-1).flatten(1)[:, :numbers] >> 24).to(torch.uint8)
    images = levels.reshape(n, *shape).float().div(127.5).sub(1)
    return Pictures("noise", images, tuple(f"noise {i}" for i in range(n)))

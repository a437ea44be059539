"""Writes samples as pictures or numbers, whole or not at all."""

from __future__ import annotations

import io
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkern import files


def to_uint8(samples: Tensor) -> np.ndarray:
    """float [n, C, H, W] on [-1, 1] -> uint8 [n, H, W, C]."""
    pixels = ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(pixels: np.ndarray, scale: int = 1, gap: int = 2) -> Image.Image:
    """uint8 [n, H, W, C] -> one picture, as square as n allows, each sample enlarged `scale` times, on white."""
    n, h, w, _ = pixels.shape
    columns = ceil(sqrt(n))
    rows = ceil(n / columns)
    sheet = Image.new("RGB", (columns * (w * scale + gap) + gap, rows * (h * scale + gap) + gap), "white")
    for i in range(n):
        picture = image(pixels[i]).resize((w * scale, h * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + i % columns * (w * scale + gap), gap + i // columns * (h * scale + gap)))
    return sheet


def image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] with C = 1 or 3 -> a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, C] with C = 1 or 3 -> the bytes of a PNG."""
    buffer = io.BytesIO()
    image(pixels).save(buffer, "png")
    return buffer.getvalue()


def kind_of(out: Path) -> str:
    """What a path asks for: "png" (a grid), "npy" or "folder". Raises ValueError for another suffix, or for a place
    that cannot be written, before any work is done for it."""
    suffix = out.suffix.lower()
    if suffix not in ("", ".png", ".npy") and not out.is_dir():
        raise ValueError(f"cannot write {out}: give a name that ends in .png or .npy, or a folder")
    kind = "folder" if out.is_dir() or not suffix else suffix[1:]
    (files.check_folder if kind == "folder" else files.check_writable)(out)
    return kind


def write(samples: Tensor, out: Path, names: list[str]) -> None:
    """Write samples [n, C, H, W] on [-1, 1] as `kind_of(out)` says; a folder gets one PNG a sample, of these names.
    Raises OSError if the disk does, and leaves no half-written file then."""
    kind = kind_of(out)
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, samples.float().cpu().numpy())
    elif kind == "png":
        pixels = to_uint8(samples)
        grid(pixels, scale=max(1, 96 // pixels.shape[1])).save(buffer, "png")
    else:
        out.mkdir(parents=True, exist_ok=True)
        for name, pixels in zip(names, to_uint8(samples), strict=True):
            files.replace(out / f"{name}.png", png(pixels))
        return
    files.replace(out, buffer.getvalue())

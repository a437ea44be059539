"""Normal noise as a pure function of (seed, sample id, draw, element): Philox4x32-10 (Salmon et al. 2011) + Box-Muller.

Key: the 64-bit seed, low word first. Counter: word 0 = element // 4 in logical (NCHW) order, word 1 = draw, words 2-3 =
the 64-bit sample id. So sample 17 of seed 0 is the same alone, in any batch, on any device and in any memory format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from math import pi, prod

import torch
from torch import Tensor

from diffkern.check import at_least, integers
from diffkern.layout import fast_dtype
from diffkern.op import Cost, Sample, for_gpu, op

_WORD = 0xFFFFFFFF


class Draw(IntEnum):
    """The first draw of each purpose (the draw's high byte), so that no two purposes ever share noise."""

    SAMPLING = 0
    TRAINING = 1 << 24
    VAE = 2 << 24
    PROBE = 3 << 24
    BOUND = 4 << 24
    DEQUANTIZE = 5 << 24
    DATA = 6 << 24


def noise_keys(seed: int, sample_ids: int | Iterable[int] | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The keys of a batch of samples: int64 [B, 2], rows (seed, sample id). An int n means the ids 0..n-1."""
    ids = torch.as_tensor(range(sample_ids) if isinstance(sample_ids, int) else sample_ids, dtype=torch.int64)
    return torch.stack([torch.full_like(ids, _signed(seed)), ids], dim=1).to(device)


def _signed(word: int) -> int:
    if not -(1 << 63) <= word < 1 << 64:
        raise ValueError(f"seed {word} does not fit in 64 bits")
    return word - (1 << 64) if word >= 1 << 63 else word


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words, in int64 arithmetic that never overflows."""
    low = a * (b & 0xFFFF)
    mid = a * (b >> 16) + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on words held in int64 tensors (broadcast together): four random words per counter."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def normal(keys: Tensor, shape: Iterable[int], draw: int | Tensor, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """The reference noise [B, *shape] for any op: `draw` is an int or an int64 [B]; computed in `dtype`."""
    shape = tuple(shape)
    n = prod(shape)
    first = offset // 4
    block = torch.arange(first, (offset + n + 3) // 4, device=keys.device)[None]
    seed, sample = keys[:, :1], keys[:, 1:]
    draws = (draw[:, None] if isinstance(draw, Tensor) else torch.full_like(seed, draw)) & _WORD
    key = (seed & _WORD, (seed >> 32) & _WORD)
    words = philox(key, (block & _WORD, draws, sample & _WORD, (sample >> 32) & _WORD))
    # The uniforms are float32 by definition, whatever the dtype: in (0, 1], so that the logarithm is finite.
    u0, v0, u1, v1 = (w.to(torch.float32) * 2**-32 + 2**-33 for w in words)
    lanes = []
    for u, v in ((u0, v0), (u1, v1)):
        radius = torch.sqrt(-2 * torch.log(u.to(dtype)))
        angle = (v - 0.5).to(dtype) * (2 * pi)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    flat = torch.stack(lanes, dim=-1).flatten(1)
    return flat[:, offset - 4 * first : offset - 4 * first + n].reshape(keys.shape[0], *shape)


@op
def randn(keys: Tensor, shape: list[int], draw: int = 0, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Standard normal noise, one independent stream per sample.

    keys: int64 [B, 2] of (seed, sample id), see `noise_keys`. shape: of one sample. draw: which noise of the sample
    (`Draw` + index). offset: the element of the sample's stream to start at.
    Returns [B, *shape] of dtype, contiguous."""
    return normal(keys, shape, draw, torch.promote_types(dtype, torch.float32), offset).to(dtype).contiguous()


@randn.checks
def _(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> None:
    integers("randn", "keys", keys, len(keys) if keys.dim() else 0, 2)
    at_least("randn", "offset is", offset, 0)
    for size in shape:
        at_least("randn", "shape has the size", size, 0)


def _supports(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> bool | str:
    if offset > 1 << 62:  # with the elements added it would be no 64-bit number
        return "takes an offset up to 2^62"
    return fast_dtype(dtype)


@randn.backend("cuda", devices=("cuda",), supports=_supports)
def _(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> Tensor:
    return torch.ops.diffkern_CUDA.randn.default(keys, shape, draw, dtype, offset)


@randn.backend("triton", devices=("cuda",), supports=_supports)
def _(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> Tensor:
    from diffkern.kernels.randn import randn as kernel

    return kernel(keys, shape, draw, dtype, offset)


@randn.backend("cpu", devices=("cpu",), supports=_supports)
def _(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> Tensor:
    return torch.ops.diffkern_C.randn(keys, shape, draw, dtype, offset)


@randn.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(
        name: str, batch: int, shape: list[int], draw: int = 0, offset: int = 0, workload: bool = False
    ) -> Sample:
        return Sample(name, lambda: (noise_keys(7, batch, device), shape, draw, dtype, offset), workload)

    yield sample("square", 3, [3, 16, 16])
    yield sample("one element", 1, [1])
    yield sample("no sample", 0, [3, 4, 4])
    yield sample("no element", 2, [0, 4])
    yield sample("odd", 5, [3, 7, 5], draw=3)
    yield sample("offset into a counter", 2, [37], offset=6)
    yield sample("beyond 2^31 elements", 2, [41], draw=int(Draw.PROBE), offset=(1 << 33) + 3)
    yield sample("SDXL latents", 16, [4, 128, 128], workload=True)
    yield sample("SD 1.5 VAE pictures", 16, [3, 512, 512], workload=True)
    yield for_gpu(sample("SD 1.5 VAE pictures, 64", 64, [3, 512, 512]))


@randn.cost
def _(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> Cost:
    n = keys.shape[0] * prod(shape)
    return Cost(bytes=n * dtype.itemsize, flops=26 * n)  # 26 instructions a normal with approximate log2, sin, cos

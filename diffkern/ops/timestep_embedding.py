"""The sinusoidal embedding of Vaswani et al. 2017 (section 3.5) at real positions: how a network is told the time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import at_least, refuse, unfit
from diffkern.layout import accumulate, fast_dtype
from diffkern.op import Cost, Sample, op

_INTEGERS = (torch.int64, torch.int32)


@op
def timestep_embedding(
    timestep: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0, max_period: float = 10000.0
) -> Tensor:
    """The sines, then the cosines of timestep * max_period^(-i / (dim // 2 - freq_shift)) for i < dim // 2.

    timestep: [B], integers or floats. flip_sin_to_cos: the cosines first. An odd dim ends in a zero.
    Returns float32 [B, dim]."""
    acc, half = accumulate(timestep.dtype), dim // 2
    exponent = torch.arange(half, dtype=acc, device=timestep.device) / (half - freq_shift)
    angle = timestep.to(acc)[:, None] * torch.exp(-math.log(max_period) * exponent)
    pair = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(pair, dim=1), (0, dim % 2))


@timestep_embedding.checks
def _(timestep: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> None:
    if timestep.dim() != 1:
        unfit("timestep_embedding", "timestep", "[B]", timestep.shape)
    at_least("timestep_embedding", "dim is", dim, 0)
    if not max_period > 0:
        refuse("timestep_embedding", f"max_period is {max_period:g}, allowed are numbers above 0")


def _supports(timestep: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> bool | str:
    return timestep.dtype in _INTEGERS or fast_dtype(timestep.dtype)


def _real(timestep: Tensor) -> Tensor:
    """Of integers the numbers that the reference computes with too."""
    return timestep.float() if timestep.dtype in _INTEGERS else timestep


@timestep_embedding.backend("triton", devices=("cuda",), supports=_supports)
def _(timestep: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> Tensor:
    from diffkern.kernels.timestep_embedding import timestep_embedding as kernel

    return kernel(_real(timestep), dim, flip_sin_to_cos, freq_shift, max_period)


@timestep_embedding.backend("cpu", devices=("cpu",), supports=_supports)
def _(timestep: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> Tensor:
    return torch.ops.diffkern_C.timestep_embedding(_real(timestep), dim, flip_sin_to_cos, freq_shift, max_period)


@timestep_embedding.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def sample(
        name: str, times: list[float], dim: int, flip: bool = True, shift: float = 0.0, workload: bool = False
    ) -> Sample:
        def args() -> tuple[object, ...]:
            return torch.tensor(times, device=device).to(dtype), dim, flip, shift, 10000.0

        return Sample(name, args, workload)

    yield sample("DDPM", [0.0, 37.5, 999.0], 32, flip=False, shift=1.0)
    yield sample("odd", [1.0, 500.0], 37)
    yield sample("one frequency", [3.0, 4.0], 2)
    yield sample("no frequency", [3.0], 1)
    yield sample("no sample", [], 16)
    yield sample("rectified flow", [0.0, 0.001, 0.5, 1.0], 64)
    yield sample("negative", [-1.0, -999.0], 16)
    yield sample("DiT", [999.0 - 7 * i for i in range(128)], 256, shift=1.0, workload=True)


@timestep_embedding.cost
def _(timestep: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float, max_period: float) -> Cost:
    return Cost(bytes=4 * timestep.numel() * dim, flops=20 * timestep.numel() * dim)

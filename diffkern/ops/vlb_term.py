"""A term of the variational bound of a diffusion model (Sohl-Dickstein et al. 2015; Ho et al. 2020, eq. 5): the KL of a
reverse step from the true posterior, or the negative log-likelihood of the data under the last one, in one pass.

A row of the table says which: how x_0 is predicted, and what the step's Gaussian is compared with. Rows of both kinds
may be mixed in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import alike, integers, refuse, rows_known, unfit
from diffkern.layout import accumulate, fast_dtype, per_sample, rows_of
from diffkern.op import Cost, Sample, for_gpu, op

# The columns of a row; the rest of its 64 bytes is zero.
A, B, CLIP, C1, K0, VAR, LOGVAR_MIN, LOGVAR_MAX, BIN = range(9)
WIDTH = 16


@op
def vlb_term(x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, timestep: Tensor) -> Tensor:
    """The variational bound's term of each (x_0, t), in nats: a sum over the elements of a sample.

        x0_hat = clip(A x_t + B m, CLIP),  d = C1 (x0 - x0_hat)
        BIN = 0:  1/2 (K0 + logvar + (VAR + d^2) exp(-logvar))
        BIN > 0:  -log [Phi((x0 + BIN - x0_hat) / s) - Phi((x0 - BIN - x0_hat) / s)],  s = exp(logvar / 2)

    The first is the KL of two Gaussians with K0 = -1 - log(true variance), VAR = true variance, C1 = weight of x_0 in
    the posterior's mean; and the negative log-density of x_0 with K0 = log(2 pi), VAR = 0, C1 = 1. The second is that
    of a pixel which stands for all values within BIN of it, where the lowest and the highest (x0 <= BIN - 1,
    x0 >= 1 - BIN) reach to infinity (Ho et al. 2020, eq. 13); it is not cut off in the tails, so it stays a bound.

    x0, x_t: [B, C, ...], one dtype. model_output: [B, C, ...], then logvar = LOGVAR_MAX; or [B, 2C, ...], m and the
    learned v: logvar = LOGVAR_MIN + (v + 1) / 2 (LOGVAR_MAX - LOGVAR_MIN) (Nichol & Dhariwal 2021, eq. 15). table:
    float32 [T, 16] with the columns named above, in their order in this file. timestep: int64 [B], rows of the table.
    Returns float32 [B]; float64 for float64 input, whose table may be float64 too. Raises RuntimeError if model_output
    has another number of channels, and for a timestep on the CPU that is no row of the table; on a GPU, where only the
    device knows it, the term of that sample is NaN."""
    acc, channels = accumulate(x0.dtype), x0.shape[1]
    m, v = model_output[:, :channels].to(acc), model_output[:, channels:].to(acc)
    columns = (per_sample(column, x0) for column in rows_of(table, timestep).to(acc)[:, : BIN + 1].unbind(1))
    a, b, clip, c1, k0, var, logvar_min, logvar, width = columns
    if v.shape[1]:
        logvar = logvar_min + (v + 1) / 2 * (logvar - logvar_min)
    x0_hat = torch.maximum(torch.minimum(a * x_t.to(acc) + b * m, clip), -clip)
    gap = x0.to(acc) - x0_hat
    gaussian = (k0 + logvar + (var + (c1 * gap) ** 2) * torch.exp(-logvar)) / 2
    is_bin = width > 0
    binned = bin_nll(x0.to(acc), gap, torch.where(is_bin, width, 1.0), torch.exp(-logvar / 2))
    return _sum(torch.where(is_bin, binned, gaussian))


@vlb_term.checks
def _(x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, timestep: Tensor) -> None:
    if x0.dim() < 2:
        unfit("vlb_term", "x0", "[B, C, ...]", x0.shape)
    (batch, channels, *pixels), given = x0.shape, model_output.shape
    if given not in ((batch, channels, *pixels), (batch, 2 * channels, *pixels)):
        refuse(
            "vlb_term",
            f"model_output must have {channels} or {2 * channels} channels and otherwise the shape {list(x0.shape)}, "
            f"got {list(given)}",
        )
    if table.dim() != 2 or table.shape[1] != WIDTH:
        unfit("vlb_term", "table", f"[T, {WIDTH}]", table.shape)
    integers("vlb_term", "timestep", timestep, batch)
    rows_known("vlb_term", "timestep", timestep, len(table))
    alike("vlb_term", "x_t", x_t, x0, batch)


def bin_nll(x0: Tensor, gap: Tensor, width: Tensor, precision: Tensor) -> Tensor:
    """-log [Phi((gap + width) precision) - Phi((gap - width) precision)], to a few units in the last place.

    By symmetry the mass lies between a and b, with a the edge that is nearer to the mean; Q = 1 - Phi.
        a <= 0:  1 - Q(-a) - Q(b)
        a > 0:   Q(a) - Q(b), as exp(-a^2 / 2) times what neither overflows nor vanishes
        narrow:  the series of the density over the bin, since the difference above would cancel
    What a case is not for it gets a harmless argument for: an infinity would make the gradient NaN."""
    lowest, highest = x0 <= width - 1, x0 >= 1 - width
    edge = lowest | highest
    y = torch.where(lowest, -gap, torch.where(highest, gap, gap.abs()))
    a, b, h = (y - width) * precision, (y + width) * precision, width * precision
    y = y * precision
    limit = torch.finfo(y.dtype).eps ** (1 / 9)  # where the series' next term is as small as what cancels
    narrow = ~edge & (h < limit) & (y * h < limit)
    straddles, tail = ~narrow & (a <= 0), ~narrow & (a > 0)

    outside = torch.erfc(-a.clamp(max=0) * 0.5**0.5) + torch.where(edge, 0.0, torch.erfc(b * 0.5**0.5))
    log_straddling = torch.log1p(-torch.where(straddles, outside, 0.0) / 2)

    a, b, between = (torch.where(tail, u, i) for i, u in ((1.0, a), (2.0, b), (1.0, 2 * y * h)))
    beyond = torch.where(edge, 0.0, torch.special.erfcx(b * 0.5**0.5) * torch.exp(-between))
    log_tail = torch.log((torch.special.erfcx(a * 0.5**0.5) - beyond) / 2) - a * a / 2

    y, h = torch.where(narrow, y, 0.0), torch.where(narrow, h, limit)
    yy, hh = (y * h) ** 2, h * h  # h^2k He_2k(y) / (2k + 1)!, with the Hermite polynomials He
    series = (yy - hh) / 6 + (yy * yy - 6 * yy * hh + 3 * hh * hh) / 120
    series = series + (yy**3 - 15 * yy * yy * hh + 45 * yy * hh * hh - 15 * hh**3) / 5040
    log_narrow = torch.log(2 * h) + torch.log1p(series) - (y * y + math.log(2 * math.pi)) / 2
    return -torch.where(narrow, log_narrow, torch.where(tail, log_tail, log_straddling))


def _sum(term: Tensor, block: int = 256) -> Tensor:
    """The sum of each sample, in blocks, so that neither the batch nor the threads choose the order."""
    flat = term.flatten(1)
    blocks = -(-flat.shape[1] // block)
    return F.pad(flat, (0, blocks * block - flat.shape[1])).unflatten(1, (blocks, block)).sum(2).sum(1)


def _row(
    alpha: float, variance: float, before: float = 0.0, bins: float = 0.0, clip: float = math.inf, density: bool = False
) -> list[float]:
    """A row for a model of epsilon at alpha_t, from the level alpha_t = `before` on; the decoder if that is none."""
    sigma = math.sqrt(1 - alpha**2)
    if before:
        ratio = (alpha / before) ** 2
        true = (1 - before**2) / sigma**2 * (1 - ratio)
        kind = [before * (1 - ratio) / sigma**2, -1 - math.log(true), true, math.log(true), math.log(variance)]
    else:
        kind = [1.0, math.log(2 * math.pi), 0.0, math.log(variance) - 1.0, math.log(variance)]
    return [1 / alpha, -sigma / alpha, clip, *kind, bins, *[0.0] * (WIDTH - BIN - 1)]


_ROWS = {
    "decoder": _row(math.sqrt(1 - 1e-4), 1e-4, bins=1 / 255, clip=1.0),
    "KL": _row(math.sqrt(0.5), 0.02, before=math.sqrt(0.51)),
    "late KL": _row(0.05, 0.019, before=0.0505, clip=1.0),
    "density": _row(math.sqrt(1 - 1e-3), 2e-3),
    "early KL": _row(math.sqrt(1 - 3e-4), 1e-4 * 2 / 3, before=math.sqrt(1 - 1e-4)),
    "wide decoder": _row(0.8, 0.7, bins=1 / 255),
    "coarse decoder": _row(0.99, 0.02, bins=1 / 3, clip=2.0),
    "far decoder": _row(0.5, 1e-3, bins=1 / 255, clip=1.0),
    "hopeless decoder": _row(0.5, 1e-8, bins=1 / 255, clip=1.0),
}


def _supports(x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, timestep: Tensor) -> bool | str:
    if x0.dtype not in (torch.float32, model_output.dtype) or x_t.dtype != x0.dtype or table.dtype != torch.float32:
        return "takes a float32 table, and x0 and x_t both in float32 or in the model's dtype"
    return fast_dtype(model_output.dtype)


@vlb_term.backend("triton", devices=("cuda",), supports=_supports)
def _(*args: Tensor) -> Tensor:
    from diffkern.kernels.vlb_term import vlb_term as kernel

    return kernel(*args)


@vlb_term.backend("cpu", devices=("cpu",), supports=_supports)
def _(*args: Tensor) -> Tensor:
    return torch.ops.diffkern_C.vlb_term.default(*args)


@vlb_term.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import SHAPES, make

    def args(rows: tuple[str, ...], shape: tuple[int, ...], layout: str, learned: bool) -> tuple[Tensor, ...]:
        normal = partial(make, shape, device, torch.float32, layout)
        table = torch.tensor([_ROWS[r] for r in rows], dtype=accumulate(dtype), device=device)
        timestep = torch.arange(shape[0], device=device) % len(rows)
        # 8-bit pixels, some at both ends; the model is off by a tenth of the noise.
        x0 = ((0.6 * normal(seed=0)).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
        noise, error = normal(seed=1), normal(seed=2)
        alpha = per_sample(1 / table[timestep, A], x0).to(x0.dtype)
        x_t = alpha * x0 + (1 - alpha**2).sqrt() * noise
        output = noise + 0.1 * error
        if learned:
            output = torch.cat([output, normal(seed=3)], 1)
            if layout == "channels_last":
                output = output.contiguous(memory_format=torch.channels_last)
        return x0.to(dtype), x_t.to(dtype), output.to(dtype), table, timestep

    def sample(name: str, shape: tuple[int, ...], layout: str = "contiguous", rows: tuple[str, ...] = ("KL", "decoder"),
               learned: bool = False, workload: bool = False) -> Sample:  # fmt: skip
        return Sample(name, partial(args, rows, shape, layout, learned), workload)

    for name, shape, layout in SHAPES:
        yield sample(name, shape, layout)
        if shape[1:] != (37,):
            yield sample(f"{name}, learned variance", shape, layout, ("decoder", "KL", "density"), learned=True)
    for row in _ROWS:  # each alone, in a batch, so that its usual error is what is allowed
        yield sample(row, (6, 3, 7, 9), rows=(row,))
        yield sample(f"{row}, learned variance", (6, 3, 7, 9), rows=(row,), learned=True)
    yield sample("all rows, several chunks", (8, 3, 41, 45), rows=tuple(_ROWS), learned=True)
    yield sample("all rows, several chunks, channels_last", (8, 3, 41, 45), "channels_last", tuple(_ROWS), learned=True)
    steps = ("early KL", "KL", "late KL")
    yield sample("CIFAR-10", (128, 3, 32, 32), rows=steps, workload=True)
    yield sample("CIFAR-10, decoder", (128, 3, 32, 32), rows=("decoder",), workload=True)
    yield sample("ImageNet-64, learned variance", (64, 3, 64, 64), rows=steps, learned=True, workload=True)
    yield for_gpu(sample("ImageNet-256, learned variance", (128, 3, 256, 256), rows=steps, learned=True))


@vlb_term.cost
def _(x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, timestep: Tensor) -> Cost:
    read = 2 * x0.numel() * x0.element_size() + model_output.numel() * model_output.element_size()
    return Cost(bytes=read + 4 * x0.shape[0], flops=(12 if model_output.shape == x0.shape else 30) * x0.numel())

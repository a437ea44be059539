"""The divergence of the probability-flow ODE's velocity, which is what log p changes by along it: the trace of its
Jacobian, exact with one backward pass per dimension, or Hutchinson's estimate e^T J e of it for random probes e, with
one backward pass per probe or as a difference of two forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffkern.layout import per_sample
from diffkern.likelihood.denoiser import Denoiser
from diffkern.likelihood.integrate import Field
from diffkern.ops.randn import Draw, normal

DIVERGENCES = ("hutchinson", "difference", "exact")
PROBES = ("rademacher", "gaussian")
# One backward pass per dimension and model call: beyond this it would take hours.
LARGEST_EXACT = 4096


def probes_of(kind: str, keys: Tensor, shape: tuple[int, ...], first: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Probes e with E[e e^T] = I: [count, B, *shape] of dtype. kind: of PROBES. keys: int64 [B, 2]. first: int64 [B],
    the index of each sample's first probe."""
    noise = torch.stack([normal(keys, shape, first + int(Draw.PROBE) + k, torch.float32) for k in range(count)])
    return (torch.where(noise < 0, -1.0, 1.0) if kind == "rademacher" else noise).to(dtype)


def flow_field(denoiser: Denoiser, labels: Tensor | None) -> Field:
    """dy/d(angle) at (angle, y = x_t / r), with nothing to integrate beside it."""

    def field(angle: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _velocity(denoiser, labels, angle, y), angle.new_zeros(len(y), 0)

    return field


def difference_field(denoiser: Denoiser, labels: Tensor | None, probes: Tensor) -> Field:
    """As `likelihood_field`, from v(y + h e) and v(y - h e): forward passes alone, by the kernels that sample, of any
    model. The velocity, their mean, and its derivative along e are then wrong by O(h^2), and the derivative by the
    rounding of v over h. h = eps^(1/3) evens these out, in units of the noise, which is the distance that v changes
    over. On emoji-32 in float32 it is within 0.0007 bits/dim of autograd's."""
    if denoiser.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"a difference of two outputs says nothing in {denoiser.dtype}: take divergence='hutchinson'")
    small = torch.finfo(denoiser.dtype or probes.dtype).eps ** (1 / 3)

    def field(angle: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = small * angle.sin()
        step = per_sample(h, y).to(y.dtype)
        twice = None if labels is None else torch.cat([labels, labels])
        v, divergence = torch.zeros_like(y), []
        for e in probes:
            both = torch.cat([y + step * e, y - step * e])
            ahead, behind = _velocity(denoiser, twice, torch.cat([angle, angle]), both).chunk(2)
            v += (ahead + behind) / (2 * len(probes))
            divergence.append(((ahead - behind) * e).to(torch.float64).flatten(1).sum(1) / (2 * h))
        return v, torch.stack(divergence, dim=1)

    return field


def likelihood_field(denoiser: Denoiser, labels: Tensor | None, probes: Tensor | None) -> Field:
    """dy/d(angle) and its divergence in y, float64 [B, K], one column for each of probes [K, B, ...]; None for the
    exact one, [B, 1]. A probe stays the same along a path, so that this is an ODE (Grathwohl et al. 2019, section
    3.1)."""
    denoiser = replace(denoiser, model=_differentiable(denoiser.model))

    def field(angle: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            v = _velocity(denoiser, labels, angle, y)
        if probes is None:
            divergence = _trace(v, y)[:, None]
        else:
            divergence = torch.stack([_product(v, y, e, k + 1 < len(probes)) for k, e in enumerate(probes)], dim=1)
        return v.detach(), divergence

    return field


def _velocity(denoiser: Denoiser, labels: Tensor | None, angle: Tensor, y: Tensor) -> Tensor:
    levels = denoiser.at_angle(angle)
    return denoiser.velocity(per_sample(levels.radius, y).to(y.dtype) * y, levels, labels)


def _product(v: Tensor, y: Tensor, e: Tensor, again: bool) -> Tensor:
    """e^T (dv/dy) e of each sample (Hutchinson 1990): float64 [B]. again: whether v is asked once more."""
    (gradient,) = torch.autograd.grad(v, y, e, retain_graph=again)
    return (gradient * e).to(torch.float64).flatten(1).sum(1)


def _trace(v: Tensor, y: Tensor) -> Tensor:
    size = v[0].numel()
    trace = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for i in range(size):
        e = torch.zeros_like(v)
        e.view(len(v), size)[:, i] = 1
        trace += _product(v, y, e, i + 1 < size)
    return trace


def _differentiable(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The model, refused where autograd cannot see through it: the divergence would be wrong and no one would know."""

    def call(*told: Any) -> Tensor:
        m = model(*told)
        if not m.requires_grad:
            raise ValueError("the divergence needs a model that autograd can follow: its output has no gradient in x")
        return m

    return call


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Inside the block the model's parameters need no gradient, which would only cost time; x does."""
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    trained = [p for p in parameters if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)

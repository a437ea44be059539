"""The energy of a diffusion model, -log p_t(x_t) up to a constant, which its score is minus the gradient of: the score
integrates back to it. What a network puts out need not be the gradient of anything; then it depends on the path."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.likelihood.denoiser import Denoiser, Levels
from diffkern.likelihood.inputs import labels_of, positive, samples_of, timesteps_of
from diffkern.progress import progress_bar
from diffkern.schedules import Schedule


@torch.no_grad()
def energy_difference(
    model: Any,
    x_a: Tensor,
    x_b: Tensor,
    t: int | Tensor,
    schedule: Schedule | None = None,
    *,
    through: Tensor | None = None,
    nodes: int = 16,
    labels: Any = None,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Tensor:
    """E(x_b) - E(x_a) = log p_t(x_a) - log p_t(x_b), in nats, of n pairs of points at a noise level: minus the line
    integral of the score from x_a to x_b, by Gauss and Legendre's rule on every straight piece of the path.

    model: a Denoiser, a `Diffusion`, or a callable with its schedule. x_a, x_b: [n, ...], noisy samples x_t. t: their
    timestep, one or int64 [n]. through: [W, n, ...], W points that each path turns at; by default it is straight.
    nodes: model calls on a piece, exact where the score is a polynomial of degree 2 nodes - 1 along it; more are needed
    the less noise there is. labels: one or n classes. batch_size: points in a model call, of whichever pairs. Returns
    float64 [n] on the CPU. Raises ValueError for arguments that do not fit together and for numbers that are not
    finite."""
    denoiser = Denoiser.of(model, schedule)
    x_a, x_b = samples_of(x_a, "x_a"), samples_of(x_b, "x_b")
    if x_a.shape != x_b.shape:
        raise ValueError(f"x_a and x_b must have one shape, not {list(x_a.shape)} and {list(x_b.shape)}")
    if through is not None and samples_of(through, "through").shape[1:] != x_a.shape:
        raise ValueError(f"through must be [W, *{list(x_a.shape)}], W points of each path, not {list(through.shape)}")
    positive(nodes=nodes, batch_size=batch_size)
    n, device = len(x_a), denoiser.device
    path = torch.stack([x_a, *(() if through is None else through), x_b]).to(device, torch.float64)
    pieces = len(path) - 1
    places, weights = (torch.from_numpy(v).to(device) / 2 for v in np.polynomial.legendre.leggauss(nodes))
    classes = labels_of(denoiser, labels, n)
    levels = denoiser.at(timesteps_of(denoiser, t, n))

    calls = n * pieces * nodes
    shares = torch.empty(calls, dtype=torch.float64, device=device)
    with progress_bar(progress, total=calls, desc="energy", unit="point") as bar:
        for first in range(0, calls, batch_size):
            index = torch.arange(first, min(first + batch_size, calls), device=device)
            pair, piece, node = index // (pieces * nodes), index // nodes % pieces, index % nodes
            start, end = path[piece, pair].flatten(1), path[piece + 1, pair].flatten(1)
            x = torch.lerp(start, end, 0.5 + places[node, None]).reshape(-1, *x_a.shape[1:])
            there = Levels(*(v[pair] for v in levels))
            _, epsilon = denoiser.predict(x, there, None if classes is None else classes[pair])
            along = ((end - start) * epsilon.flatten(1)).sum(1) / there.sigma  # minus the score is epsilon / sigma
            shares[first : first + len(index)] = weights[node] * along
            bar.update(len(index))
    return shares.reshape(n, pieces * nodes).sum(1).cpu()


def path_dependence(
    model: Any,
    x_a: Tensor,
    x_b: Tensor,
    t: int | Tensor,
    schedule: Schedule | None = None,
    *,
    through: Tensor,
    **options: Any,
) -> Tensor:
    """`energy_difference` through the given points minus that on the straight line: float64 [n], zero (but for the
    integration's error) for the gradient of a density, as the true score is. In nats, to be read beside the difference
    itself. Arguments as for `energy_difference`."""
    detour = energy_difference(model, x_a, x_b, t, schedule, through=through, **options)
    return detour - energy_difference(model, x_a, x_b, t, schedule, **options)

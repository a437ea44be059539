"""log p(x) of a latent-variable model from below: the evidence lower bound (Kingma & Welling 2013, eq. 3), and the
importance-weighted one (Burda et al. 2016, eq. 8), which rises from it to log p(x) as its number of draws grows.

A model is what can be called as below; `VAE` and `HierarchicalVAE` are two, a few lines make one of anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern.likelihood.inputs import ids_of, positive, samples_of
from diffkern.likelihood.result import Likelihood
from diffkern.ops.randn import Draw, noise_keys, philox
from diffkern.progress import progress_bar
from diffkern.samplers.step import placement


class Terms(NamedTuple):
    """What one draw of the latents, z_1, ..., z_T ~ q(z | x), costs in nats. float64, [B] and [B, T].

    reconstruction: -log p(x | z_1). ratio: log q(z_t | ...) - log p(z_t | ...) of each level, so that
    log p(x, z) / q(z | x) = -reconstruction - ratio.sum(1), of this draw. kl: the same in expectation over q, in closed
    form where there is one, else the ratio."""

    reconstruction: Tensor
    ratio: Tensor
    kl: Tensor

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) / q(z | x): [B]."""
        return -self.reconstruction - self.ratio.sum(1)

    @property
    def elbo(self) -> Tensor:
        """log p(x | z_1) - KL, an estimate of the bound with less noise than log_weight: [B]. What training raises."""
        return -self.reconstruction - self.kl.sum(1)


LatentModel = Callable[[Tensor, Tensor], Terms]
"""(x [B, ...], keys int64 [B, 2]) -> Terms. The noise of a row follows from its key, as by `reparameterize`."""


def elbo(
    model: LatentModel,
    x: Tensor,
    *,
    samples: int = 16,
    seed: int = 0,
    sample_ids: Iterable[int] | None = None,
    batch_size: int = 512,
    progress: bool | None = None,
) -> Likelihood:
    """The evidence lower bound E_q[log p(x | z_1)] - KL(q(z | x) || p(z)) <= log p(x), as the mean of `samples` draws.

    model: see LatentModel; a module is called on its device, in eval mode or not, as it is. x: [n, ...],
    on the levels that the model's decoder is for. seed, sample_ids: the noise of an image follows from these alone, not
    from the batch; ids default to 0..n-1. batch_size: (image, draw) pairs in a call of the model, of many images.
    progress: True, False, or None for a bar on a terminal once the work takes longer than two seconds.

    Returns a Likelihood with the terms "reconstruction" [n] and "kl" [n, T], level 1 first. stderr: from the spread of
    the draws; NaN for one. Raises ValueError for arguments that are not as above."""
    positive(samples=samples)
    ids = ids_of(sample_ids, len(samples_of(x)))

    def costs(terms: Terms) -> Tensor:
        return torch.cat([terms.reconstruction[:, None], terms.kl], dim=1)

    drawn = _drawn(model, x, samples, noise_keys(seed, ids), batch_size, progress, costs, "elbo")  # [n, samples, 1 + T]
    mean = drawn.mean(1)
    terms, errors = ({"reconstruction": of[:, 0], "kl": of[:, 1:]} for of in (mean, _stderr(drawn)))
    return Likelihood(-mean.sum(1), _stderr(drawn.sum(2)), x.shape[1:].numel(), "elbo", terms, errors)


def iwae(
    model: LatentModel,
    x: Tensor,
    k: int,
    *,
    seed: int = 0,
    sample_ids: Iterable[int] | None = None,
    batch_size: int = 512,
    progress: bool | None = None,
) -> Likelihood:
    """The importance-weighted bound E[log (1/k sum_j p(x, z_j) / q(z_j | x))] <= log p(x), estimated from one set of k
    draws. k = 1 is the ELBO with every term sampled; the first draws of a larger k are those of a smaller one.

    The arguments are those of `elbo`. Returns a Likelihood without terms. stderr: by the delta method, the spread of
    the weights over their mean and sqrt(k); too small while a few of the draws have most of the weight; NaN for k = 1.
    """
    positive(k=k)
    ids = ids_of(sample_ids, len(samples_of(x)))

    def weights(terms: Terms) -> Tensor:
        return terms.log_weight[:, None]

    log_weight = _drawn(model, x, k, noise_keys(seed, ids), batch_size, progress, weights, f"iwae, k = {k}")[..., 0]
    log_p = log_weight.logsumexp(1) - math.log(k)
    relative = torch.exp(log_weight - log_p[:, None])  # their mean is 1
    return Likelihood(log_p, _stderr(relative), x.shape[1:].numel(), "iwae")


@torch.no_grad()
def _drawn(
    model: LatentModel, x: Tensor, draws: int, keys: Tensor, batch_size: int, progress: bool | None,
    numbers: Callable[[Terms], Tensor], name: str,
) -> Tensor:  # fmt: skip
    """`numbers` of the terms [B, K] of each draw of each image: float64 [n, draws, K] on the CPU."""
    positive(batch_size=batch_size)
    device, _ = placement(model)
    x = x.to(device)
    parts = []
    with progress_bar(progress, total=len(x) * draws, desc=name, unit="draw") as bar:
        for pairs in torch.arange(len(x) * draws).split(batch_size):
            image = pairs // draws
            told = _keys_of_draw(keys[image], pairs % draws).to(device)
            parts.append(numbers(model(x[image.to(device)], told)).to("cpu", torch.float64))
            bar.update(len(pairs))
    return torch.cat(parts).unflatten(0, (len(x), draws))


def _stderr(draws: Tensor) -> Tensor:
    """Of the means of [n, draws, ...]: float64 [n, ...], NaN for a single draw."""
    m = draws.shape[1]
    return draws.std(1) / m**0.5 if len(draws) and m > 1 else torch.full_like(draws[:, 0], math.nan)


def _keys_of_draw(keys: Tensor, draw: Tensor) -> Tensor:
    """Keys of their own for the draws int64 [B] of samples with the keys [B, 2]: the sample id stays, the seed is a
    word of the sample's stream. So one call of the model, whose draws are its own, takes rows of any image and draw."""
    seed, sample = keys[:, 0], keys[:, 1]
    word = 0xFFFFFFFF
    counter = (draw, torch.full_like(draw, int(Draw.VAE)), sample & word, (sample >> 32) & word)
    low, high, _, _ = philox((seed & word, (seed >> 32) & word), counter)
    return torch.stack([(high << 32) | low, sample], dim=1)

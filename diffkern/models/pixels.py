"""What a decoder can say of a pixel: distributions over the levels that one has, and the numbers that they need."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.ops.vlb_term import bin_nll


class Pixels(Protocol):
    """p(x | z) of independent pixels. parameters: numbers that the decoder puts out for a pixel. All tensors are
    [B, D], theirs [B, parameters D]."""

    parameters: int

    def check(self, x: Tensor) -> None:
        """Raise ValueError if x is nothing that this is a distribution of."""

    def log_prob(self, x: Tensor, given: Tensor) -> Tensor:
        """log p(x | z) in nats, of all pixels together: float64 [B]."""

    def mean(self, given: Tensor) -> Tensor:
        """What to show of z: E[x | z], but for the rounding."""

    def draw(self, given: Tensor, noise: Tensor) -> Tensor:
        """x from standard normal noise [B, D]."""


class Bernoulli:
    """Pixels that are 0 or 1, by their logits."""

    parameters = 1

    def check(self, x: Tensor) -> None:
        if not ((x == 0) | (x == 1)).all():
            raise ValueError("x must be 0 or 1 in every pixel: the decoder is a Bernoulli distribution")

    def log_prob(self, x: Tensor, given: Tensor) -> Tensor:
        return (x * given - F.softplus(given)).sum(1, dtype=torch.float64)

    def mean(self, given: Tensor) -> Tensor:
        return torch.sigmoid(given)

    def draw(self, given: Tensor, noise: Tensor) -> Tensor:
        return (torch.special.ndtr(noise) < torch.sigmoid(given)).to(given.dtype)


class DiscretizedGaussian:
    """Pixels on `levels` values evenly spaced on [-1, 1]: a normal rounded to them (Ho et al. 2020, eq. 13), by its
    mean and the logarithm of its standard deviation."""

    parameters = 2

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def check(self, x: Tensor) -> None:
        steps = (x + 1) * ((self.levels - 1) / 2)
        if not ((x.abs() <= 1) & ((steps - steps.round()).abs() < 0.05)).all():
            raise ValueError(f"x must be on the {self.levels} levels of the decoder, evenly spaced on [-1, 1]")

    def log_prob(self, x: Tensor, given: Tensor) -> Tensor:
        mean, log_std = self._split(given)
        nll = bin_nll(x, x - mean, x.new_tensor(1 / (self.levels - 1)), torch.exp(-log_std))
        return -nll.sum(1, dtype=torch.float64)

    def mean(self, given: Tensor) -> Tensor:
        return self._split(given)[0].clamp(-1, 1)

    def draw(self, given: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self._split(given)
        steps = (self.levels - 1) / 2
        return ((mean + log_std.exp() * noise + 1) * steps).round().clamp(0, 2 * steps) / steps - 1

    def _split(self, given: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = given.chunk(2, dim=1)
        return mean, log_std.clamp(-7, 2)  # from far less than a bin of 8 bits to far more than all

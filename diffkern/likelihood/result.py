"""What every way to score an image returns: log p(x) of each, with its error bar, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Likelihood:
    """log p(x) of n samples, or a bound on it, in nats, larger is likelier.

    log_p: float64 [n]. stderr: float64 [n], the standard error of each from its own Monte-Carlo noise: 0 for an exact
    figure, NaN where a single draw cannot tell. dims: numbers in a sample, D. method: "elbo", "iwae", "vlb", "vdm" or
    "ode". terms: what log_p is made of, by name, as float64 [n] or [n, K] in nats that count against it: -log_p is
    their sum; none for "iwae", which is a logarithm of a sum. terms_stderr: the standard error of each number of terms,
    as stderr. All on the CPU."""

    log_p: Tensor
    stderr: Tensor
    dims: int
    method: str
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    terms_stderr: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.log_p)

    @property
    def bits_per_dim(self) -> Tensor:
        """float64 [n]: -log2 p(x) / D, smaller is likelier."""
        return -self.log_p / (self.dims * math.log(2))

    @property
    def bits_per_dim_stderr(self) -> Tensor:
        """float64 [n]: the standard error of `bits_per_dim`."""
        return self.stderr / (self.dims * math.log(2))

    def average(self) -> tuple[float, float]:
        """Mean bits per dimension of the samples, and its standard error as the mean of a population that they were
        drawn from: their spread holds the Monte-Carlo noise too. NaN for fewer than two samples."""
        bits = self.bits_per_dim
        spread = bits.std().item() / len(bits) ** 0.5 if len(bits) > 1 else math.nan
        return (bits.mean().item() if len(bits) else math.nan), spread

    @classmethod
    def joined(cls, parts: Sequence[Likelihood]) -> Likelihood:
        """The results of parts of a set, one after the other."""
        first = parts[0]
        terms = {name: torch.cat([p.terms[name] for p in parts]) for name in first.terms}
        errors = {name: torch.cat([p.terms_stderr[name] for p in parts]) for name in first.terms_stderr}
        log_p, stderr = torch.cat([p.log_p for p in parts]), torch.cat([p.stderr for p in parts])
        return cls(log_p, stderr, first.dims, first.method, terms, errors)

"""Data whose log p(x) is known exactly, at every noise level: what every bound, estimate and sampler is tested against.

All in float64 on the CPU, and differentiable in x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.layout import per_sample
from diffkern.ops.randn import Draw, normal
from diffkern.samplers.grid import SMALLEST_ALPHA
from diffkern.schedules import PREDICTIONS, Schedule

Numbers = Tensor | Sequence[Any]


class GaussianMixture:
    """p(x_0) = sum_k weights_k N(x_0; means_k, covariance_k), and what x_t = alpha x_0 + sigma epsilon makes of it:
    p(x_t) = sum_k weights_k N(x_t; alpha means_k, alpha^2 covariance_k + sigma^2 I).

    weights: [K], divided by their sum. means: [K, D]. variances: [K] of isotropic components, [K, D] of diagonal ones,
    or [K, D, D], whole covariances. Tensors or lists; all become float64. Samples may have any shape of D numbers: x is
    [n, ...]. alpha and sigma are one number or [n]. Raises ValueError for parameters that are not finite, not positive
    (definite), or do not fit together."""

    def __init__(self, weights: Numbers, means: Numbers, variances: Numbers) -> None:
        self.weights = _finite("the weights of a mixture", weights)
        self.means = _finite("the means of a mixture", means)
        self.variances = _finite("the variances of a mixture", variances)
        if self.means.dim() != 2 or 0 in self.means.shape:
            raise ValueError(f"the means of a mixture must be of shape [K, D], not {list(self.means.shape)}")
        K, D = self.means.shape
        if list(self.weights.shape) != [K] or not (self.weights > 0).all():
            raise ValueError(f"the weights of a mixture of {K} components must be {K} positive numbers")
        if list(self.variances.shape) not in ([K], [K, D], [K, D, D]):
            raise ValueError(
                f"the variances of a mixture must be of shape {[K]}, {[K, D]} or {[K, D, D]}, "
                f"not {list(self.variances.shape)}"
            )
        if self.variances.dim() == 3 and not torch.allclose(self.variances, self.variances.mT):
            raise ValueError("the covariances of a mixture must be symmetric")
        if not (self._axes[0] > 0).all():
            raise ValueError("the variances of a mixture must be positive (and a covariance positive definite)")
        self.weights = self.weights / self.weights.sum()

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor | None]:
        """Variances [K, D] along the axes of each component, and the axes as columns [K, D, D], None for those of x.
        Noise is the same along any axes: it leaves them as they are."""
        if self.variances.dim() == 3:
            return torch.linalg.eigh(self.variances)
        return (self.variances if self.variances.dim() == 2 else self.variances[:, None]).expand_as(self.means), None

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x - alpha mean along the axes of each component [n, K, D], its variance there, and
        log weight_k N(x; ...) [n, K]."""
        D = self.means.shape[1]
        if x.shape[1:].numel() != D:
            raise ValueError(f"x must be [n, ...] with {D} numbers in a sample, not {list(x.shape)}")
        variances, axes = self._axes
        off = x.to(torch.float64).reshape(len(x), 1, D) - alpha * self.means
        if axes is not None:
            off = torch.einsum("nki,kij->nkj", off, axes)
        variance = alpha**2 * variances + sigma**2
        log_density = -0.5 * (off**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return off, variance, self.weights.log() + log_density

    def _averaged(self, parts: Tensor, shares: Tensor) -> Tensor:
        """Of vectors along the axes of each component, [n, K, D], the mean under p(k | x), [n, K]: [n, D]."""
        parts = shares[..., None] * parts
        axes = self._axes[1]
        return parts.sum(1) if axes is None else torch.einsum("nkj,kij->ni", parts, axes)

    def log_prob(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """log p(x_t) of each sample: float64 [n]."""
        return self._components(x, _level(alpha), _level(sigma))[2].logsumexp(1)

    def responsibilities(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """p(k | x_t), float64 [n, K]."""
        return torch.softmax(self._components(x, _level(alpha), _level(sigma))[2], 1)

    def score(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """The gradient of log p(x_t) in x_t: float64, of the shape of x."""
        return self._score_and_mean(x, alpha, sigma)[0]

    def posterior_mean(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """E[x_0 | x_t], what the best denoiser puts out: float64, of the shape of x."""
        return self._score_and_mean(x, alpha, sigma)[1]

    def _score_and_mean(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        a = _level(alpha)
        off, variance, joint = self._components(x, a, _level(sigma))
        off, shares = off / variance, torch.softmax(joint, 1)
        score = self._averaged(-off, shares)
        mean = shares @ self.means + self._averaged(a * self._axes[0] * off, shares)
        return score.reshape(x.shape), mean.reshape(x.shape)

    def sample(self, keys: Tensor, draw: int = int(Draw.DATA)) -> Tensor:
        """Draws of x_0, float64 [n, D]. keys: int64 [n, 2], see `noise_keys`. draw: which of each key."""
        K, D = self.means.shape
        noise = normal(keys, (D + 1,), draw, torch.float64)
        # One more normal, as a uniform, chooses the component.
        chosen = torch.searchsorted(self.weights.cumsum(0), torch.special.ndtr(noise[:, D])).clamp(max=K - 1)
        variances, axes = self._axes
        off = variances[chosen].sqrt() * noise[:, :D]
        if axes is not None:
            off = torch.einsum("nj,nij->ni", off, axes[chosen])
        return self.means[chosen] + off

    def model(self, schedule: Schedule) -> Callable[[Tensor, float | Tensor], Tensor]:
        """The perfect model of this data, model(x, time), for `Denoiser.of` and `diffkern.sample`: it puts out what
        the schedule's prediction asks for, in the dtype of its input, and knows its noise level by the time that it is
        told, also between timesteps."""

        def model(inputs: Tensor, time: float | Tensor) -> Tensor:
            alpha, sigma = told(schedule, torch.as_tensor(time, dtype=torch.float64).expand(len(inputs)))
            x = inputs.to(torch.float64)
            if schedule.path == "ve":  # undo c_in
                x = per_sample((sigma**2 + schedule.sigma_data**2) ** 0.5, x) * x
            score, x0 = self._score_and_mean(x, alpha, sigma)
            u, w = PREDICTIONS[schedule.prediction](alpha, sigma, schedule.sigma_data)
            return (per_sample(u, x) * x0 - per_sample(w * sigma, x) * score).to(inputs.dtype)  # epsilon = -sigma score

        return model


def told(schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """The (alpha, sigma) that a model is to understand by what it is told, float64 [n]: the inverse of
    `Denoiser.at_angle`, and at the schedule's own timesteps what they are."""
    match schedule.path:
        case "flow":
            sigma = time / len(schedule)
            return 1 - sigma, sigma
        case "ve":
            return torch.ones_like(time), torch.exp(4 * time)
    level = schedule.sigma_t.log() - schedule.alpha_t.clamp(min=SMALLEST_ALPHA["vp"]).log()
    below = time.floor().long().clamp(0, len(schedule) - 2)
    angle = torch.atan(torch.exp(torch.lerp(level[below], level[below + 1], time - below)))
    last = time == len(schedule) - 1  # where alpha may be 0, whose logarithm nothing is interpolated to
    return torch.where(last, schedule.alpha_t[-1], angle.cos()), torch.where(last, schedule.sigma_t[-1], angle.sin())


class Gaussian(NamedTuple):
    """N(mean, covariance). mean: [d], or [n, d] of n distributions. covariance: [d, d], of all. float64."""

    mean: Tensor
    covariance: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """[n]. x: [n, d]."""
        L = torch.linalg.cholesky(self.covariance)
        white = torch.linalg.solve_triangular(L, torch.atleast_2d(x - self.mean).mT, upper=False)
        return -0.5 * (white**2).sum(0) - L.diagonal().log().sum() - 0.5 * len(L) * math.log(2 * math.pi)

    def entropy(self) -> Tensor:
        """One number: 1/2 log det(2 pi e covariance)."""
        return 0.5 * torch.logdet(2 * math.pi * math.e * self.covariance)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other), [n]: minus the entropy, minus the mean of the other's log density."""
        trace = torch.linalg.solve(other.covariance, self.covariance).trace()
        return 0.5 * trace - other.log_prob(self.mean) - self.entropy()

    def sample(self, keys: Tensor, draw: int) -> Tensor:
        """[n, d]. keys: int64 [n, 2]. draw: which of each key."""
        noise = normal(keys, self.mean.shape[-1:], draw, torch.float64)
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).mT


class LinearGaussianChain:
    """A hierarchical latent model z_T -> ... -> z_1 -> x, all of it Gaussian: z_T ~ N(0, I) and, with z_0 = x,
    z_{t-1} = W_t z_t + bias_t + N(0, variance_t).

    steps: (W_t [d_{t-1}, d_t], bias_t [d_{t-1}], variance_t: one number or [d_{t-1}]) from t = 1, which makes x, to T.
    Tensors, lists or numbers; all become float64. x: [n, d_0]; latents: z_1 to z_T, [n, d_t] each. Raises ValueError
    for steps that are not finite, without noise, or do not fit together."""

    def __init__(self, steps: Sequence[tuple[Numbers, Numbers, Numbers | float]]) -> None:
        if not steps:
            raise ValueError("a chain needs at least one step")
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for t, (given_weight, given_bias, given_variance) in enumerate(steps, 1):
            weight, bias = _finite(f"W_{t}", given_weight), _finite(f"bias_{t}", given_bias)
            variance = _finite(f"variance_{t}", given_variance)
            if weight.dim() != 2 or bias.shape != weight.shape[:1] or variance.shape not in (bias.shape, ()):
                raise ValueError(f"step {t} of a chain needs W [d, k], bias [d] and variance [d] or one number")
            if not (variance > 0).all():
                raise ValueError(f"variance_{t} must be positive")
            if t > 1 and len(weight) != self.steps[-1][0].shape[1]:
                raise ValueError(f"W_{t} makes {len(weight)} numbers, but W_{t - 1} takes {self.steps[-1][0].shape[1]}")
            self.steps.append((weight, bias, torch.diag(variance.expand(len(bias)))))

    @cached_property
    def marginals(self) -> list[Gaussian]:
        """p(x), p(z_1), ..., p(z_T)."""
        d = self.steps[-1][0].shape[1]
        levels = [Gaussian(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))]
        for weight, bias, noise in reversed(self.steps):
            mean, covariance = levels[0]
            levels.insert(0, Gaussian(weight @ mean + bias, weight @ covariance @ weight.mT + noise))
        return levels

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), [n]."""
        return self.marginals[0].log_prob(x)

    def below(self, t: int, z: Tensor) -> Gaussian:
        """p(z_{t-1} | z_t): the decoder of level t."""
        weight, bias, noise = self.steps[t - 1]
        return Gaussian(z @ weight.mT + bias, noise)

    def above(self, t: int, z: Tensor) -> Gaussian:
        """p(z_t | z_{t-1}), which is p(z_t | z_{t-1}, ..., x): the perfect encoder of level t (Tipping & Bishop 1999,
        eq. 7, with any prior). z: z_{t-1}, x for t = 1."""
        weight, (mean, covariance), low = self.steps[t - 1][0], self.marginals[t], self.marginals[t - 1]
        gain = torch.linalg.solve(low.covariance, weight @ covariance).mT
        return Gaussian(mean + (z - low.mean) @ gain.mT, covariance - gain @ weight @ covariance)

    def log_joint(self, x: Tensor, *latents: Tensor) -> Tensor:
        """log p(x, z_1, ..., z_T), [n]."""
        total = self.marginals[-1].log_prob(latents[-1])
        for t, (low, high) in enumerate(zip((x, *latents), latents, strict=False), 1):
            total = total + self.below(t, high).log_prob(low)
        return total

    def posterior(self, x: Tensor) -> Gaussian:
        """p(z_1, ..., z_T | x): of all latents side by side."""
        precision, d = self._precision, len(self.steps[0][0])
        covariance = torch.linalg.inv(precision[d:, d:])
        mean = torch.cat([level.mean for level in self.marginals[1:]])
        return Gaussian(mean - (x - self.marginals[0].mean) @ (covariance @ precision[d:, :d]).mT, covariance)

    def elbo(self, x: Tensor, q: Gaussian) -> Tensor:
        """E_q[log p(x, z)] + H(q), [n], at most log p(x). q: of all latents side by side."""
        d = len(self.steps[0][0])
        latents = q.mean.expand(len(x), -1).split([weight.shape[1] for weight, _, _ in self.steps], dim=1)
        trace = (self._precision[d:, d:] @ q.covariance).trace()
        return self.log_joint(x, *latents) - 0.5 * trace + q.entropy()

    def sample(self, keys: Tensor) -> list[Tensor]:
        """Draws of x, z_1, ..., z_T. keys: int64 [n, 2], see `noise_keys`."""
        T = len(self.steps)
        states = [self.marginals[-1].sample(keys, Draw.DATA + T)]
        for t in range(T, 0, -1):
            states.insert(0, self.below(t, states[0]).sample(keys, Draw.DATA + t - 1))
        return states

    @cached_property
    def _precision(self) -> Tensor:
        """Of x, z_1, ..., z_T side by side: the sum over steps of R^T noise^-1 R, with R (x, z) = z_{t-1} - W_t z_t."""
        sizes = [len(level.mean) for level in self.marginals]
        starts = [sum(sizes[:t]) for t in range(len(sizes))]
        total = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
        total[starts[-1] :, starts[-1] :] = torch.eye(sizes[-1])
        for (weight, _, noise), start, size in zip(self.steps, starts, sizes, strict=False):
            residual = torch.cat([torch.eye(size), -weight], dim=1)
            part = slice(start, start + sum(weight.shape))
            total[part, part] += residual.mT @ (residual / noise.diagonal()[:, None])
        return total


class LinearGaussian(LinearGaussianChain):
    """Probabilistic PCA (Tipping & Bishop 1999): x = W z + mean + noise, with z ~ N(0, I). weight: [d, k]. mean: [d].
    variance: of the noise, one number, or [d] (factor analysis). A chain of one level."""

    def __init__(self, weight: Numbers, mean: Numbers, variance: Numbers | float) -> None:
        super().__init__([(weight, mean, variance)])


def _finite(what: str, value: Numbers | float) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64)
    if not value.isfinite().all():
        raise ValueError(f"{what} must be finite numbers")
    return value


def _level(value: float | Tensor) -> Tensor:
    """One number or one per sample, to broadcast against [n, K, D]."""
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1)

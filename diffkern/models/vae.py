"""The variational autoencoder (Kingma & Welling 2013; Rezende et al. 2014): p(x) = integral of p(x | z) p(z) dz, with
p(z) = N(0, I), a network for p(x | z), and another for q(z | x), the normal that stands in for the posterior."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.layout import accumulate
from diffkern.likelihood.elbo import Terms
from diffkern.likelihood.gaussian import kl_normal, log_normal
from diffkern.models import folder
from diffkern.models.blocks import project
from diffkern.models.pixels import Bernoulli, DiscretizedGaussian, Pixels
from diffkern.ops.randn import Draw, noise_keys, randn
from diffkern.ops.reparameterize import reparameterize

DECODERS = ("discretized_gaussian", "bernoulli")


@dataclass(frozen=True)
class VAEConfig:
    """shape: of one sample. latent_dims: numbers in z_1, ..., z_T. width, depth, dropout: of the hidden layers of each
    network. decoder: "discretized_gaussian", for pixels on pixel_levels values evenly spaced on [-1, 1], or
    "bernoulli", for pixels that are 0 or 1. Raises ModelError, a ValueError, for what cannot be built."""

    shape: tuple[int, ...] = (1, 8, 8)
    latent_dims: tuple[int, ...] = (16,)
    width: int = 256
    depth: int = 2
    dropout: float = 0.0
    decoder: str = "discretized_gaussian"
    pixel_levels: int = 256

    def __post_init__(self) -> None:
        low = {"dropout": 0, "pixel_levels": 2}
        for f in fields(self):
            folder.check_type(f.name, getattr(self, f.name), str(f.type), low.get(f.name, 1))
        folder.check_choice("decoder", self.decoder, DECODERS)
        for key, high in (("shape", 4), ("latent_dims", 64)):
            if not 1 <= len(getattr(self, key)) <= high:
                raise folder.ModelError(f"config.json has {len(getattr(self, key))} numbers in {key}, not 1 to {high}")
        if self.depth > 64:
            raise folder.ModelError(f"config.json has depth {self.depth}: allowed here is 1 to 64")
        if self.dropout >= 1:
            raise folder.ModelError(f"config.json has dropout {self.dropout}: allowed here is from 0 to less than 1")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> VAEConfig:
        """Read a config.json. Raises ModelError naming a value that cannot be built."""
        return cls(**folder.values_of(cls, config))


class Normal(NamedTuple):
    """N(mean, exp(logvar)), [B, D] each: what a network says of the next latents."""

    mean: Tensor
    logvar: Tensor

    def sample(self, keys: Tensor, draw: int) -> Tensor:
        """A draw with the noise of `keys`, int64 [B, 2]: the op `reparameterize`."""
        return reparameterize(self.mean, self.logvar, keys, draw)

    def log_prob(self, z: Tensor) -> Tensor:
        return log_normal(z, self.mean, self.logvar)

    def kl(self, prior: Normal) -> Tensor:
        return kl_normal(self.mean, self.logvar, prior.mean, prior.logvar)

    @classmethod
    def standard(cls, like: Tensor) -> Normal:
        return cls(torch.zeros_like(like), torch.zeros_like(like))


class MLP(nn.Module):
    """[B, ...] -> [B, outputs]: linear layers with SiLU between them, in the op `linear` and the dtype of the weights.
    What comes out is float32 at least: nothing else is computed in less."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig) -> None:
        super().__init__()
        widths = [inputs, *[config.width] * config.depth]
        self.dropout = config.dropout
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])
        self.out = nn.Linear(config.width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1).to(self.out.weight.dtype)
        for layer in self.hidden:
            h = F.dropout(project(cast(nn.Linear, layer), h, "silu"), self.dropout, self.training)
        return project(self.out, h).to(accumulate(h.dtype))


class NormalMLP(MLP):
    """A network for the mean and the log-variance of D numbers."""

    def __init__(self, inputs: int, dims: int, config: VAEConfig) -> None:
        super().__init__(inputs, 2 * dims, config)

    def forward(self, x: Tensor) -> Normal:  # type: ignore[override]
        mean, logvar = super().forward(x).chunk(2, dim=1)
        return Normal(mean.contiguous(), logvar.clamp(-30, 20))  # exp of it is finite in float32


class VAE(nn.Module):
    """One level of latents: q(z | x) and p(x | z) are networks, p(z) = N(0, I). Called as model(x, keys), it is what
    `diffkern.likelihood.elbo` and `iwae` take, and `model(x, keys).elbo.mean()` is what training raises.

    Raises ModelError, a ValueError, for a config with more than one level."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if type(self) is VAE and len(config.latent_dims) != 1:
            raise folder.ModelError(f"a VAE has one level of latents, not {len(config.latent_dims)}")
        self.config = config
        bernoulli = config.decoder == "bernoulli"
        self.pixels: Pixels = Bernoulli() if bernoulli else DiscretizedGaussian(config.pixel_levels)
        numbers, dims = prod(config.shape), config.latent_dims[0]
        self.encoder = NormalMLP(numbers, dims, config)
        self.decoder = MLP(dims, self.pixels.parameters * numbers, config)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.config.shape

    def forward(self, x: Tensor, keys: Tensor) -> Terms:
        """x: [B, *shape], on the levels of the decoder. keys: int64 [B, 2], see `noise_keys`. Returns what a draw of
        the latents costs. Raises ValueError for an x of another shape or off the levels."""
        q = self.encoder(self._input(x))
        z, prior = q.sample(keys, int(Draw.VAE)), Normal.standard(q.mean)
        ratio = q.log_prob(z) - prior.log_prob(z)
        return Terms(self._reconstruction(x, z), ratio[:, None], q.kl(prior)[:, None])

    @torch.no_grad()
    def sample(self, n: int | Iterable[int] = 1, seed: int = 0, *, mean: bool = False) -> Tensor:
        """Draws from p(x): [n, *shape], on the levels of the decoder. n: how many, or their sample ids: sample i of a
        seed is the same in any batch. mean: whether the decoder shows its mean, without noise of the pixels, which
        looks better and is no draw from p(x)."""
        keys = noise_keys(seed, n, self.decoder.out.weight.device)
        z = self._prior(keys)
        if mean:
            return self._shown(z)
        given = self.decoder(z)
        noise = randn(keys, [prod(self.config.shape)], Draw.SAMPLING + len(self.config.latent_dims), given.dtype)
        return self.pixels.draw(given, noise).unflatten(1, self.config.shape)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, level: int = 1) -> Tensor:
        """What the decoder shows of the latents z_level: [B, *shape], its mean; all networks between are represented by
        their means too. What that level knows of x. x: as for a call. Raises ValueError for a level that the model does
        not have."""
        if not 1 <= level <= len(self.config.latent_dims):
            raise ValueError(f"level must be 1 to {len(self.config.latent_dims)}, not {level}")
        return self._shown(self._known_above(self.encoder(self._input(x)).mean, level))

    def _known_above(self, z: Tensor, level: int) -> Tensor:
        """z_1 as it is after a way up to z_level and back."""
        return z

    def _prior(self, keys: Tensor) -> Tensor:
        """A draw of the lowest latents, [B, latent_dims[0]]."""
        return randn(keys, [self.config.latent_dims[0]], int(Draw.SAMPLING), accumulate(self.decoder.out.weight.dtype))

    def _shown(self, z: Tensor) -> Tensor:
        return self.pixels.mean(self.decoder(z)).unflatten(1, self.config.shape)

    def _reconstruction(self, x: Tensor, z: Tensor) -> Tensor:
        return -self.pixels.log_prob(x.flatten(1), self.decoder(z))

    def _input(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.config.shape:
            raise ValueError(f"x must be [B, {', '.join(map(str, self.config.shape))}], not {list(x.shape)}")
        self.pixels.check(x)
        return x

    @classmethod
    def from_folder(
        cls: type[Model], path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Model:
        """Read a folder that `save` wrote (config.json and safetensors), ready to use. Raises ModelError, with a
        sentence that names what is wrong."""
        config = folder.read_config(path, cls.__name__)
        with torch.device("meta"):
            model = cls(VAEConfig.from_dict(config))
        folder.read_weights(model, path, dtype, device)
        return model.eval()

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the folder that `from_folder` reads."""
        folder.write(path, {"_class_name": type(self).__name__, **asdict(self.config)}, self.state_dict(), dtype)


Model = TypeVar("Model", bound=VAE)

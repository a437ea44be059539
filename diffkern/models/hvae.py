"""The hierarchical VAE with T levels of latents in a Markov chain (Sønderby et al. 2016; Luo 2022, section 2.2):
p(x, z) = p(x | z_1) p(z_1 | z_2) ... p(z_T), with q(z | x) = q(z_1 | x) q(z_2 | z_1) ... q(z_T | z_T-1).

The exact posterior is of that form too: given z_t, z_t+1 knows nothing more of x. A diffusion model is one whose
latents are as large as x and whose encoder is fixed: q(z_t | z_t-1) scales z_t-1 and adds noise, so that nothing of it
is learnt and z_t can be drawn without those below; its bound is `diffkern.likelihood.vlb`."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from diffkern.layout import accumulate
from diffkern.likelihood.elbo import Terms
from diffkern.models.vae import VAE, Normal, NormalMLP, VAEConfig
from diffkern.ops.randn import Draw, randn


class HierarchicalVAE(VAE):
    """A `VAE` with len(config.latent_dims) levels: the same for one, which has the same weights. encoder: q(z_1 | x).
    up: q(z_t+1 | z_t), down: p(z_t | z_t+1), for t = 1 to T - 1."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        steps = list(pairwise(config.latent_dims))
        self.up = nn.ModuleList([NormalMLP(lower, upper, config) for lower, upper in steps])
        self.down = nn.ModuleList([NormalMLP(upper, lower, config) for lower, upper in steps])

    def forward(self, x: Tensor, keys: Tensor) -> Terms:
        """As that of `VAE`. Only the highest level has its KL in closed form: p(z_t | z_t+1) of a lower one depends on
        what is drawn from z_t."""
        posteriors = [self.encoder(self._input(x))]
        latents = [posteriors[0].sample(keys, int(Draw.VAE))]
        for t, network in enumerate(self.up, start=1):
            posteriors.append(network(latents[-1]))
            latents.append(posteriors[-1].sample(keys, Draw.VAE + t))
        priors = [network(z) for network, z in zip(self.down, latents[1:], strict=True)]
        priors.append(Normal.standard(latents[-1]))

        levels = zip(posteriors, priors, latents, strict=True)
        ratio = torch.stack([q.log_prob(z) - p.log_prob(z) for q, p, z in levels], dim=1)
        kl = torch.cat([ratio[:, :-1], posteriors[-1].kl(priors[-1])[:, None]], dim=1)
        return Terms(self._reconstruction(x, latents[0]), ratio, kl)

    def _known_above(self, z: Tensor, level: int) -> Tensor:
        for network in (*self.up[: level - 1], *reversed(self.down[: level - 1])):
            z = cast(NormalMLP, network)(z).mean
        return z

    def _prior(self, keys: Tensor) -> Tensor:
        dims = self.config.latent_dims
        z = randn(keys, [dims[-1]], Draw.SAMPLING + len(dims) - 1, accumulate(self.decoder.out.weight.dtype))
        for t in reversed(range(len(dims) - 1)):
            z = cast(NormalMLP, self.down[t])(z).sample(keys, Draw.SAMPLING + t)
        return z

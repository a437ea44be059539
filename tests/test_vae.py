"""VAE and hierarchical VAE, against torch.distributions and quadrature, what their decoders say and draw."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Independent, Normal, kl_divergence

from diffkern import HierarchicalVAE, ModelError, noise_keys
from diffkern.likelihood import elbo, iwae
from diffkern.models.pixels import Bernoulli, DiscretizedGaussian
from diffkern.models.vae import VAE, VAEConfig
from diffkern.ops.randn import Draw, normal
from diffkern.ops.reparameterize import reparameterize

KEYS = noise_keys(0, 5)


def built(kind: type[VAE] = VAE, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    torch.manual_seed(0)
    small = {"shape": (1, 2, 3), "latent_dims": (4,), "width": 16, "depth": 1, "pixel_levels": 17}
    return kind(VAEConfig(**{**small, **config})).to(dtype).eval()


def pictures(n: int, levels: int = 17, dtype: torch.dtype = torch.float64) -> Tensor:
    steps = torch.special.ndtr(normal(noise_keys(5, n), (1, 2, 3), 0, torch.float64)) * (levels - 1)
    return (steps.round() * (2 / (levels - 1)) - 1).to(dtype)


def distribution(parameters: Any) -> Independent:
    return Independent(Normal(parameters.mean, torch.exp(parameters.logvar / 2)), 1)


def test_a_vae_is_its_formula():
    model, x = built(decoder="bernoulli"), (pictures(5) > 0).double()
    terms = model(x, KEYS)
    q = distribution(model.encoder(x))
    prior = Independent(Normal(torch.zeros(5, 4).double(), 1.0), 1)
    z = reparameterize(*model.encoder(x), KEYS)
    reconstruction = -Independent(TorchBernoulli(logits=model.decoder(z)), 1).log_prob(x.flatten(1))
    torch.testing.assert_close(terms.reconstruction, reconstruction)
    torch.testing.assert_close(terms.kl[:, 0], kl_divergence(q, prior))
    torch.testing.assert_close(terms.ratio[:, 0], q.log_prob(z) - prior.log_prob(z))
    torch.testing.assert_close(terms.log_weight, -reconstruction - q.log_prob(z) + prior.log_prob(z))


def test_a_hierarchical_vae_is_its_formula():
    model, x = built(HierarchicalVAE, latent_dims=(4, 3, 2)), pictures(5)
    terms = model(x, KEYS)
    z = [x]
    log_q, log_p = [], []
    for t, network in enumerate([model.encoder, *model.up]):
        posterior = network(z[-1])
        z.append(reparameterize(*posterior, KEYS, Draw.VAE + t))
        log_q.append(distribution(posterior).log_prob(z[-1]))
    for lower, above, network in zip(z[1:], z[2:], model.down, strict=False):
        log_p.append(distribution(network(above)).log_prob(lower))
    prior = Independent(Normal(torch.zeros(5, 2).double(), 1.0), 1)
    log_p.append(prior.log_prob(z[-1]))
    for t in range(3):
        torch.testing.assert_close(terms.ratio[:, t], log_q[t] - log_p[t])
    torch.testing.assert_close(terms.kl[:, :2], terms.ratio[:, :2])
    torch.testing.assert_close(terms.kl[:, 2], kl_divergence(distribution(model.up[1](z[2])), prior))
    mean, log_std = model.decoder(z[1]).chunk(2, 1)
    upper, lower = (torch.special.ndtr((x.flatten(1) + side - mean) / log_std.exp()) for side in (1 / 16, -1 / 16))
    upper, lower = upper.masked_fill(x.flatten(1) == 1, 1.0), lower.masked_fill(x.flatten(1) == -1, 0.0)
    torch.testing.assert_close(terms.reconstruction, -(upper - lower).log().sum(1))


def test_a_reconstruction_is_what_a_level_knows():
    model, x = built(HierarchicalVAE, latent_dims=(4, 3, 2)), pictures(5)
    z_1 = model.encoder(x).mean
    z_2 = model.up[0](z_1).mean
    for level, back in enumerate((z_1, model.down[0](z_2).mean), start=1):
        shown = model.decoder(back)[:, :6].clamp(-1, 1).view(5, 1, 2, 3)
        assert torch.equal(model.reconstruct(x, level), shown)


def test_one_level_is_the_vae():
    vae, one = built(), built(HierarchicalVAE)
    one.load_state_dict(vae.state_dict())
    x = pictures(5)
    for ours, theirs in zip(one(x, KEYS), vae(x, KEYS), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(one.sample(3, 1), vae.sample(3, 1))
    assert torch.equal(one.reconstruct(x), vae.reconstruct(x))
    assert torch.equal(iwae(one, x, 3).log_p, iwae(vae, x, 3).log_p)


def test_many_draws_reach_log_p_by_quadrature_and_it_is_a_distribution():
    model = built(decoder="bernoulli", latent_dims=(1,), shape=(3,))
    x = torch.tensor(list(product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    with torch.no_grad():
        given = model.decoder(z[:, None])
        joint = torch.stack([model.pixels.log_prob(row.expand_as(given), given) for row in x], 1)
    log_p = (joint + Normal(0.0, 1.0).log_prob(z)[:, None]).logsumexp(0) + math.log(18 / 2000)
    assert log_p.logsumexp(0).item() == pytest.approx(0, abs=1e-12)  # over all eight x

    with torch.no_grad():
        model.encoder.out.bias += 0.5  # an encoder that is not too good
    importance, evidence = iwae(model, x, 2000), elbo(model, x, samples=200)
    assert ((importance.log_p - log_p) / importance.stderr).abs().max() < 3.5
    assert (evidence.log_p < log_p - 3 * evidence.stderr).all()


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("log_std", [-7.0, -2.0, 2.0])
def test_the_levels_of_a_discretised_gaussian_have_probabilities_that_sum_to_1(levels: int, log_std: float):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]
    for mean in (-3.0, -1.0, 0.1, 0.98):
        given = torch.tensor([[mean, log_std]]).double().expand(levels, 2).clone().requires_grad_()
        log_p = DiscretizedGaussian(levels).log_prob(x, given)
        assert log_p.logsumexp(0).item() == pytest.approx(0, abs=1e-12)
        assert torch.autograd.grad(log_p.sum(), given)[0].isfinite().all()


@pytest.mark.parametrize("pixels", [Bernoulli(), DiscretizedGaussian(5)])
def test_what_a_decoder_draws_has_the_probabilities_that_it_says(pixels: Any):
    levels = torch.tensor([0.0, 1.0] if isinstance(pixels, Bernoulli) else [-1.0, -0.5, 0.0, 0.5, 1.0]).double()
    given = torch.tensor([[0.6, -0.5]]).double()[:, : pixels.parameters]
    probabilities = torch.stack([pixels.log_prob(x.view(1, 1), given)[0] for x in levels]).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    n = 20_000
    drawn = pixels.draw(given.expand(n, -1), normal(noise_keys(2, n), (1,), 0, torch.float64))
    counts = torch.stack([(drawn == x).sum() for x in levels])
    assert counts.sum() == n
    z = (counts / n - probabilities) / (probabilities * (1 - probabilities) / n).sqrt()
    assert z.abs().max() < 3.5


def test_a_step_of_training_raises_the_bound_and_reaches_every_weight():
    model, x = built(HierarchicalVAE, torch.float32, latent_dims=(4, 3, 2)), pictures(5, dtype=torch.float32)
    before = model(x, KEYS).elbo.mean()
    before.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-3 * p.grad
    assert model(x, KEYS).elbo.mean() > before


def test_samples_are_on_the_levels_and_the_same_in_any_batch():
    model = built(HierarchicalVAE, latent_dims=(4, 3))
    x = model.sample(6, 2)
    assert x.shape == (6, 1, 2, 3)
    model.pixels.check(x)
    torch.testing.assert_close(model.sample([4, 1], 2, mean=True), model.sample(6, 2, mean=True)[[4, 1]])
    assert torch.equal(model.sample([4, 1], 2), x[[4, 1]])
    assert elbo(model, x, samples=2).log_p.isfinite().all()


def test_a_bfloat16_model_rounds_its_networks_only():
    model = built(HierarchicalVAE, torch.bfloat16, latent_dims=(4, 2), pixel_levels=256)
    wide = built(HierarchicalVAE, torch.bfloat16, latent_dims=(4, 2), pixel_levels=256).float()
    x = pictures(5, 256, torch.float32)  # levels that bfloat16 does not have
    # A rounding of 2^-8 in each number that a network puts out, of a bound of about 35 nats.
    torch.testing.assert_close(elbo(model, x).log_p, elbo(wide, x).log_p, rtol=2**-8, atol=0.1)
    model.pixels.check(model.sample(5))
    assert elbo(model, x[:0]).log_p.shape == (0,)


@pytest.mark.parametrize("kind", [VAE, HierarchicalVAE])
def test_a_saved_model_is_read_as_it_was(kind: type[VAE], tmp_path: Any):
    model = built(kind, torch.float32, latent_dims=(4,) if kind is VAE else (4, 2))
    model.save(tmp_path)
    loaded = kind.from_folder(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.sample(3), model.sample(3))
    with pytest.raises(ModelError, match="holds a"):
        ({VAE, HierarchicalVAE} - {kind}).pop().from_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "width": 17}))
    with pytest.raises(ModelError, match="the config asks for"):
        kind.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_dims": ()}, "config.json has 0 numbers in latent_dims, not 1 to 64"),
        ({"latent_dims": (0,)}, "config.json has latent_dims 0: this must be int, numbers from 1"),
        ({"latent_dims": (4, 2)}, "a VAE has one level of latents, not 2"),
        ({"pixel_levels": 1}, "config.json has pixel_levels 1: this must be int, numbers from 2"),
        ({"dropout": 1.0}, "config.json has dropout 1.0: allowed here is from 0 to less than 1"),
        ({"decoder": "normal"}, "config.json has decoder 'normal': allowed here is discretized_gaussian, bernoulli"),
    ],
)
def test_a_config_that_cannot_be_built_gets_a_sentence(config: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        VAE(VAEConfig(**config))


def test_an_x_that_does_not_fit_gets_a_sentence():
    model, binary = built(), built(decoder="bernoulli")
    for wrong in (pictures(2) + 0.05, pictures(2) * 2, torch.full((2, 1, 2, 3), 0.55).double()):
        with pytest.raises(ValueError, match="x must be on the 17 levels of the decoder, evenly spaced on"):
            model(wrong, KEYS[:2])
    with pytest.raises(ValueError, match="x must be 0 or 1 in every pixel"):
        elbo(binary, pictures(2))
    with pytest.raises(ValueError, match=r"x must be \[B, 1, 2, 3\], not \[2, 6\]"):
        model.reconstruct(pictures(2).flatten(1))
    with pytest.raises(ValueError, match="level must be 1 to 1, not 2"):
        built(HierarchicalVAE).reconstruct(pictures(2), level=2)

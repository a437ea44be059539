"""The ops of a transformer against the functions of diffusers that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkern
from diffkern.testing import make

pytest.importorskip("diffusers")

from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from diffusers.models.normalization import AdaLayerNormZero, RMSNorm


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dim", [128, 33])
def test_timestep_embedding(flip, shift, dim):
    t = torch.tensor([0.0, 0.5, 37.5, 999.0])
    expected = get_timestep_embedding(t.double(), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    # an angle of 999 in float32, which is what diffusers computes its frequencies in, is right to 6e-5
    torch.testing.assert_close(diffkern.timestep_embedding(t, dim, flip, shift), expected.float(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_timestep_embedding_of_integers(kind):
    t = torch.tensor([0, 3, 999])
    got = diffkern.timestep_embedding(t.to(kind), 32)
    assert torch.equal(got, diffkern.timestep_embedding(t.float(), 32))


@pytest.mark.parametrize("weight", [True, False])
def test_rms_norm(weight):
    norm = RMSNorm(24, 1e-6, elementwise_affine=weight)
    if norm.weight is not None:
        norm.weight = torch.nn.Parameter(make((24,), "cpu", torch.float32, seed=1))
    x = make((2, 5, 24), "cpu", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(diffkern.rms_norm(x, norm.weight, 1e-6), norm(x))


def test_layer_norm_modulate():
    torch.manual_seed(0)
    norm = AdaLayerNormZero(24)
    x, emb = make((2, 5, 24), "cpu", torch.float32), make((2, 24), "cpu", torch.float32, seed=1)
    with torch.no_grad():
        shift, scale = norm.linear(norm.silu(emb)).chunk(6, dim=1)[:2]
        torch.testing.assert_close(diffkern.layer_norm_modulate(x, shift, scale), norm(x, emb=emb)[0])


@pytest.mark.parametrize(("interleaved", "unbind"), [(True, -1), (False, -2)])
@pytest.mark.parametrize("norm", [True, False])
def test_qk_norm_rope(interleaved, unbind, norm):
    q, k = make((2, 5, 4, 16), "cpu", torch.float32), make((2, 5, 2, 16), "cpu", torch.float32, seed=1)
    angle = make((5, 8), "cpu", torch.float32, seed=2)
    angle = angle.repeat_interleave(2, dim=1) if interleaved else torch.cat([angle, angle], dim=1)
    rotation: Any = (angle.cos(), angle.sin())
    weights = [make((16,), "cpu", torch.float32, seed=s) if norm else None for s in (3, 4)]
    for x, weight, got in zip(
        (q, k), weights, diffkern.qk_norm_rope(q, k, *weights, *rotation, interleaved), strict=True
    ):
        if weight is not None:
            theirs = RMSNorm(16, 1e-6)
            theirs.weight = torch.nn.Parameter(weight)
            x = theirs(x).detach()
        expected = apply_rotary_emb(x, rotation, use_real_unbind_dim=unbind, sequence_dim=1)
        torch.testing.assert_close(got, expected)

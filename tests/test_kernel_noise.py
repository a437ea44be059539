"""The noise counter in Triton: the integers bit for bit, the normals within their bound, the same in every layout."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton_kernels import DEVICE, interpreted, run

from diffkern.available import availability
from diffkern.ops.randn import Draw, noise_keys, normal, philox

if (reason := availability("triton")) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from diffkern.kernels import common

pytestmark = pytest.mark.device


@triton.jit
def _words(out, keys, draw, first, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    words = common.philox_words(keys, tl.program_id(0).to(tl.int64), draw, (first + i).to(tl.uint32))
    for lane in tl.static_range(4):
        tl.store(out + (tl.program_id(0) * 4 + lane) * SIZE + i, words[lane].to(tl.int64))


def test_the_integers_are_the_references_bit_for_bit():
    ids = [0, 17, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, -1]
    keys = torch.cat([noise_keys(seed, ids) for seed in (0, 1, (1 << 32) + 5, (1 << 64) - 1)]).to(DEVICE)
    for draw, first in ((0, 0), (int(Draw.PROBE) + 7, (1 << 32) - 3), (0xFFFFFFFF, 12345)):
        got = torch.empty(len(keys), 4, 8, dtype=torch.int64, device=DEVICE)
        _words[(len(keys),)](got, keys, draw, first, SIZE=8)
        word = 0xFFFFFFFF
        seed, sample = keys[:, :1], keys[:, 1:]
        block = torch.arange(first, first + 8, device=DEVICE)[None] & word
        key = (seed & word, (seed >> 32) & word)
        expected = philox(key, (block, torch.full_like(seed, draw), sample & word, (sample >> 32) & word))
        assert torch.equal(got, torch.stack(torch.broadcast_tensors(*expected), dim=1))


@triton.jit
def _normals(out, words, FAST: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = common.box_muller(tl.load(words + i).to(tl.uint32), tl.load(words + SIZE + i).to(tl.uint32), FAST)
    tl.store(out + i, a)
    tl.store(out + SIZE + i, b)


def _box_muller(words: Tensor, fast: bool) -> tuple[Tensor, Tensor]:
    got = torch.empty(words.shape, device=DEVICE)
    _normals[(1,)](got, words, FAST=fast, SIZE=words.shape[1])
    u, v = (w.to(torch.float32) * 2**-32 + 2**-33 for w in words)
    radius, angle = torch.sqrt(-2 * torch.log(u.double())), (v - 0.5).double() * (2 * math.pi)
    return got, torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])


def _hard_words() -> Tensor:
    """Words that make the radius 0, the largest, and everything near the change from logarithm to series."""
    top = 1 << 32
    edges = [0, 1, 2, top - 1, top - 2, top - 129, top // 2, top - top // 32, top - top // 32 - 200, top - top // 31]
    words = torch.tensor(edges + [top - int(1.3**k) - 1 for k in range(84)], dtype=torch.int64)
    spread = (torch.arange(1024) * 2654435761) % top
    return torch.stack([torch.cat([words, spread])[:1024], spread.flip(0)]).to(DEVICE)


def test_normals_stay_finite_and_near_float64_at_the_edges():
    got, expected = _box_muller(_hard_words(), fast=False)
    assert got.isfinite().all()
    assert (got - expected).abs().max() < 2e-6


@interpreted
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_fast_normals_differ_by_less_than_the_stated_bound(monkeypatch, sign):
    # The worst that the GPU's manual allows its approximate instructions, each at its bound in the same direction.
    worst = SimpleNamespace(
        fast_log2f=lambda u: tl.log2(u) + sign * 2.0**-22,
        fast_cosf=lambda t: tl.cos(t) + sign * 2.0**-20.5,
        fast_sinf=lambda t: tl.sin(t) + sign * 2.0**-20.5,
    )
    monkeypatch.setattr(common, "libdevice", worst)
    got, expected = _box_muller(_hard_words(), fast=True)
    assert (got - expected).abs().max() < (1e-5 if sign else 2e-6)


@pytest.mark.gpu
def test_fast_normals_on_the_gpu():
    got, expected = _box_muller(_hard_words(), fast=True)
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (2, 5, 3, 7), (2, 70, 2, 2), (1, 3, 30, 30)])
def test_noise_does_not_depend_on_the_layout(shape):
    keys = noise_keys(3, [5, 1 << 40][: shape[0]], DEVICE)
    zeros = torch.zeros(shape, device=DEVICE)
    flat = run("reparameterize", zeros, zeros, keys, 9)[0]
    nhwc = zeros.contiguous(memory_format=torch.channels_last)
    assert torch.equal(flat, run("reparameterize", nhwc, nhwc, keys, 9)[0])
    assert torch.equal(flat, run("randn", keys, list(shape[1:]), 9, torch.float32, 0)[0])
    assert (flat - normal(keys, shape[1:], 9, torch.float32)).abs().max() < 1e-5


def test_an_offset_continues_the_stream():
    keys = noise_keys(1, 2, DEVICE)
    whole = run("randn", keys, [5000], 0, torch.float32, 0)[0]
    for offset in (1, 2, 3, 4, 2047, 4999):
        assert torch.equal(run("randn", keys, [5000 - offset], 0, torch.float32, offset)[0], whole[:, offset:])

"""What the noise promises: the integers of Philox, the bound on the normals, and the same in every op and layout."""

from __future__ import annotations

import itertools
import subprocess

import pytest
import torch

import diffkern
from diffkern import Draw, noise_keys, toolchain
from diffkern.ops.randn import normal, philox
from diffkern.testing import make, ulp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORY = ("contiguous", "channels_last")

# -------------------------------------------------------------------------------------------------------- the integers

ONES = 0xFFFFFFFF
# Random123's known answers for philox4x32-10: key, counter, words. The last are the digits of pi.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES), (ONES, ONES, ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference_words(key, counter) -> tuple[int, ...]:
    k0, k1, c0, c1, c2, c3 = (torch.tensor([word]) for word in (*key, *counter))
    return tuple(int(word) for word in philox((k0, k1), (c0, c1, c2, c3)))


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_reference_gives_the_known_answers(key, counter, expected):
    assert reference_words(key, counter) == expected


PROGRAM = """
#include "common/philox.h"
#include "cpu/noise.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** arg) {
  uint32_t w[6];  // key, counter
  for (int i = 0; i < 6; ++i) w[i] = std::strtoul(arg[i + 1], nullptr, 10);
  const int64_t keys[] = {int64_t(uint64_t{w[1]} << 32 | w[0]), int64_t(uint64_t{w[5]} << 32 | w[4])};
  uint32_t out[4][diffkern::kBlocks];
  diffkern::detail::philox_words(diffkern::Stream(keys, w[3]), w[2], out);
  const auto one = diffkern::philox::words(w[0], w[1], {{w[2], w[3], w[4], w[5]}});
  for (int j = 0; j < 4; ++j) std::printf("%u ", one.w[j]);
  for (int i = 0; i < diffkern::kBlocks; ++i) for (int j = 0; j < 4; ++j) std::printf("%u ", out[j][i]);
}
"""


@pytest.mark.parametrize("level", [*toolchain.levels(), "x86-64"])
def test_cpp_gives_the_integers_of_the_reference(tmp_path, level):
    try:
        compiler = toolchain.find_compiler()
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    source, program = tmp_path / "words.cpp", tmp_path / "words"
    source.write_text(PROGRAM)
    flags = [*toolchain.level_flags(level).split(), f"-I{toolchain.sources()}", "-o", program]
    subprocess.run([compiler, *flags, source], check=True)
    for key, counter, expected in KNOWN:
        arguments = map(str, (*key, *counter))
        words = list(map(int, subprocess.check_output([program, *arguments], text=True).split()))
        assert tuple(words[:4]) == expected
        for i in range(16):  # the counters behind it, also where the first word wraps
            at = ((counter[0] + i) & ONES, *counter[1:])
            assert tuple(words[4 + 4 * i : 8 + 4 * i]) == reference_words(key, at)


# --------------------------------------------------------------------------------------------------------- the normals


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals_are_within_four_ulp(cpu, dtype):
    """Of the definition in exact arithmetic: also next to a zero, where float32 arithmetic would be far off."""
    keys = noise_keys(2024, 4)
    exact = normal(keys, [1 << 16], Draw.VAE, torch.float64)
    error = (diffkern.randn(keys, [1 << 16], Draw.VAE, dtype).double() - exact).abs()
    error = (error - 1e-15).clamp(min=0)  # float64's own: cos(pi / 2) is not zero there
    assert (error / ulp(exact, dtype)).max() <= (4 if dtype == torch.float32 else 0.51)


def test_uniforms_at_both_ends_give_finite_normals(cpu):
    """u = 2^-33 is the smallest uniform: sqrt(66 ln 2) = 6.76 bounds a normal. None of 4 million is near or NaN."""
    z = diffkern.randn(noise_keys(0, 4), [1 << 20])
    assert z.isfinite().all()
    assert 4.5 < z.abs().max() < 6.77


def test_distribution(cpu):
    z = diffkern.randn(noise_keys(1, 16), [1 << 16]).double()
    n = z.numel()
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(z.pow(power).mean() - mean) < 4.5 * (variance / n) ** 0.5
    steps = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    kolmogorov = (torch.special.ndtr(z.flatten().sort().values) - steps).abs().max()
    assert kolmogorov < 1.95 / n**0.5  # one sample in a thousand is above
    lanes = z.reshape(-1, 4).T
    assert (torch.corrcoef(lanes) - torch.eye(4)).abs().max() < 5 / (n / 4) ** 0.5
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4.5 / n**0.5


def test_no_two_streams_share_noise(backend):
    """Seeds, samples and draws that differ in one bit, low or high."""
    seeds, samples = (0, 1, 1 << 32, -1), (0, 1, 1 << 32, (1 << 63) - 1)
    draws = (0, 1, 50, Draw.TRAINING, Draw.VAE, Draw.PROBE)
    keys = torch.tensor(list(itertools.product(seeds, samples)))
    n = 256 if backend == "triton" else 1024
    streams = torch.cat([diffkern.randn(keys, [n], int(draw)) for draw in draws])
    together = torch.corrcoef(streams.double()) - torch.eye(len(streams))
    assert together.abs().max() < 6 / n**0.5


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 3, 7, 5), (2, 37, 6, 9), (2, 2, 40, 40)])
def test_every_op_draws_the_noise_of_randn(backend, shape, memory):
    keys, x = noise_keys(5, range(9, 9 + shape[0])), make(shape, "cpu", torch.float32, memory)
    table = torch.tensor([[0.0, 1.0]])
    expected = diffkern.randn(keys, list(shape[1:]), Draw.TRAINING)
    x_t, noise = diffkern.add_noise(x, torch.zeros(shape[0], dtype=torch.int64), table, keys, return_noise=True)
    assert torch.equal(noise, expected)
    assert torch.equal(x_t, expected)
    zero = torch.zeros_like(x)
    assert torch.equal(diffkern.reparameterize(zero, zero, keys), diffkern.randn(keys, list(shape[1:]), Draw.VAE))

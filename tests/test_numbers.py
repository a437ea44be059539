"""What the numbers promise: the integers of Philox, the bound on the normals, and that a result depends on nothing but
the arguments of its own sample: not the batch, the layout, the threads or the op that draws the noise."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import Draw, noise_keys, toolchain, use_backend
from diffkern.op import OPS, availability, triton_interpreted
from diffkern.ops.randn import normal, philox
from diffkern.testing import make, tensors, ulp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("cpu", "triton", "reference")
MEMORY = ("contiguous", "channels_last")
SUMS = ("linear", "query_key_value", "conv2d", "attention", "group_norm_silu", "group_norm_silu_backward")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if (reason := availability(request.param)) is not None:
        pytest.skip(reason)
    if request.param == "triton" and not triton_interpreted():
        pytest.skip("runs on GPU tensors; the samples here are on the CPU")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def cpu():
    if (reason := availability("cpu")) is not None:
        pytest.skip(reason)
    with use_backend("cpu"):
        yield


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


# ------------------------------------------------------------------------------------- what a result does not depend on


def calls(op: Any, dtype: torch.dtype, workloads: bool):
    for sample in op.make_samples("cpu", dtype):
        if sample.workload != workloads:
            continue
        args = sample.args()
        batch = next(a for a in args if isinstance(a, Tensor)).shape[0]
        if batch > 1:
            yield sample.name, args, batch


SHARED = (
    "table", "alpha_sigma", "weight", "bias", "q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias", "cos",
    "sin",
)  # fmt: skip  # by all samples


def alone(op: Any, args: tuple[Any, ...], i: int, batch: int) -> tuple[Any, ...]:
    """The arguments of sample i by itself."""

    def one(name: str, a: Any) -> Any:
        if not isinstance(a, Tensor) or name in SHARED:
            return a
        return torch.cat([a[j : j + 1] for j in range(i, a.shape[0], batch)])  # two of a guided model output

    return tuple(one(name, a) for name, a in zip(op.signature.parameters, args, strict=True))


# By Triton's backend a library multiplies, and promises it only if it is asked.
PRODUCTS = ("linear", "conv2d", "query_key_value")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_sample_alone_equals_the_sample_in_a_batch(op, dtype, backend):
    if not any(b.name == backend for b in op.all_backends()):
        pytest.skip(f"{op.name} has no {backend} backend")
    if backend == "reference" and op.name in SUMS:
        pytest.skip("PyTorch's own sums are taken in an order that depends on the size of the batch")
    asked = backend == "triton" and op.name in PRODUCTS
    with diffkern.batch_invariant() if asked else contextlib.nullcontext():
        for name, args, batch in calls(op, dtype, workloads=False):
            together = tensors(op(*args))
            for i in range(batch) if backend == "cpu" else (batch - 1,):
                for got, expected in zip(tensors(op(*alone(op, args, i, batch))), together, strict=True):
                    same = torch.equal(got, expected[i::batch]) if expected.numel() else not got.numel()
                    assert same, f"{name}: sample {i} of {batch} differs"


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_long_row_of_three_layers_equals_itself_in_a_batch(dtype, cpu):
    """oneDNN has two kernels for long rows, of which one is for a single row."""
    x, weights = make((3, 1, 1100), "cpu", dtype), [make((5, 1100), "cpu", dtype, seed=s) for s in (1, 2, 3)]
    together = diffkern.query_key_value(x, *weights)
    for i in range(3):
        assert torch.equal(diffkern.query_key_value(x[i : i + 1], *weights), together[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_neither_threads_nor_a_large_batch_change_a_bit(op, dtype, cpu):
    before = torch.get_num_threads()
    for name, args, batch in calls(op, dtype, workloads=True):
        if op.count_cost(*args).bytes > 1 << 26:
            continue
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(tensors(op(*args)))
        single = tensors(op(*alone(op, args, batch - 1, batch)))
        torch.set_num_threads(before)
        for one, two, five, last in zip(*results, single, strict=True):
            assert torch.equal(one, two), name
            assert torch.equal(one, five), name
            if one.numel():
                assert torch.equal(one[batch - 1 :: batch], last), name


# ----------------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.name != "randn"], ids=lambda op: op.name)
def test_nan_and_infinity_mean_what_they_mean_in_the_reference(op, dtype, value, cpu):
    sample = next(s for s in op.make_samples("cpu", dtype) if not s.workload)
    names = list(op.signature.parameters)
    for position, name in enumerate(names):
        args = list(sample.args())
        a = args[position]
        if not isinstance(a, Tensor) or not a.is_floating_point() or name in ("table", "alpha_sigma"):
            continue
        if op.name == "group_norm_silu" and abs(value) == float("inf") and name != "x":
            continue  # silu(-inf) is NaN in PyTorch's formula and -inf / inf here: both follow from an overflow
        a[(0,) * a.dim()] = value
        expected = tensors(op.reference(*args))
        for got, e in zip(tensors(op.overload(*args)), expected, strict=True):
            assert torch.equal(got.isnan(), e.isnan()), f"{name}: NaN elsewhere"
            assert torch.equal(got.isinf(), e.isinf()), f"{name}: infinity elsewhere"


# ------------------------------------------------------------------------------------------------- beyond 2^31 elements

BLOCK = 1 << 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_is_rounded_as_pytorch_rounds_it(cpu, dtype):
    """Every pattern of a float32's upper half, with lower halves around those at which rounding turns: ties, subnormal
    numbers, overflows, every NaN. A rotation of ones by (cos, 0) is cos, rounded; 190 numbers a row end off a block."""
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    bits = (torch.arange(1 << 16)[:, None] << 16 | lower).flatten()
    cos = torch.cat([bits, bits[: -len(bits) % 190]]).to(torch.int32).view(torch.float32).view(-1, 190)
    ones = torch.ones(1, len(cos), 1, 190, dtype=dtype)
    got = diffkern.qk_norm_rope(ones, ones, None, None, cos, torch.zeros_like(cos))[0].view_as(cos)
    torch.testing.assert_close(got, cos.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORY)
def test_group_norm_beyond_two_to_the_31(cpu, memory):
    """The same block over and over: the last must come out as the first."""
    block = make((BLOCK,), "cpu", torch.bfloat16)
    many = block.repeat(2049)  # 2^31 + 2^20 elements
    if memory == "contiguous":
        y = diffkern.group_norm_silu(many.view(1, 2049, BLOCK), 2049).view(2049, BLOCK)
    else:
        x = many.view(1, 2049, BLOCK // 4, 4).permute(0, 3, 1, 2)
        y = diffkern.group_norm_silu(x, 2).permute(0, 2, 3, 1).reshape(2049, BLOCK)
    del many
    assert y[0].isfinite().all()
    assert torch.equal(y[-1], y[0])


@pytest.mark.slow
def test_noise_beyond_two_to_the_31(cpu):
    n = (1 << 31) + BLOCK
    x, keys = torch.zeros(1, n, dtype=torch.bfloat16), noise_keys(0, 1)
    x_t, _ = diffkern.add_noise(x, torch.tensor([0]), torch.tensor([[1.0, 1.0]]), keys)
    for start in (0, n - BLOCK):
        expected = diffkern.randn(keys, [BLOCK], Draw.TRAINING, torch.bfloat16, offset=start)
        assert torch.equal(x_t[:, start : start + BLOCK], expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_reach_their_limits(backend, activation):
    """Beyond where the exponential in them is zero or infinite: x itself, or nothing."""
    far = torch.tensor([20.0, 80.0, 87.9, 88.2, 88.9, 100.0, 1e3, 1e10, 3e37])
    values = torch.cat([far, -far])
    if activation == "silu":  # a picture of zeros is its bias once it is normalised
        x = torch.zeros(1, len(values), 2, 2)
        y = diffkern.group_norm_silu(x, len(values), torch.ones(len(values)), values)[0, :, 1, 1]
        expected = torch.nn.functional.silu(values.double())
    else:
        y = diffkern.linear(torch.zeros(1, 3, 2), torch.zeros(len(values), 2), values, activation)[0, 2]
        expected = torch.nn.functional.gelu(values.double(), approximate="tanh")
    assert (y.double() - expected).abs().le(1e-6 * expected.abs() + 1e-7).all()

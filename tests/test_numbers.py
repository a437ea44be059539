"""What a result depends on, the arguments of its own sample and not the batch or the threads, and what it is at the
edges: NaN and infinity, the limits of rounding and of exponentials, beyond 2^31 elements."""

from __future__ import annotations

import contextlib

import pytest
import torch
from one_sample import alone, calls
from torch import Tensor

import diffkern
from diffkern import Draw, noise_keys
from diffkern.op import OPS
from diffkern.testing import make, tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORY = ("contiguous", "channels_last")
SUMS = (
    "linear", "query_key_value", "conv2d", "conv2d_moments", "attention", "group_norm_silu", "group_norm_silu_backward",
)  # fmt: skip

ON_CPU = [op for op in OPS.values() if any(b.name == "cpu" for b in op.backends)]

# ------------------------------------------------------------------------------------- what a result does not depend on

# By Triton's backend a library multiplies, and promises it only if it is asked.
PRODUCTS = ("linear", "conv2d", "conv2d_moments", "query_key_value")


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
                for got, expected in zip(tensors(op(*alone(op, args, i))), together, strict=True):
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
@pytest.mark.parametrize("op", ON_CPU, ids=lambda op: op.name)
def test_neither_threads_nor_a_large_batch_change_a_bit(op, dtype, cpu):
    before = torch.get_num_threads()
    for name, args, batch in calls(op, dtype, workloads=True):
        if op.count_cost(*args).bytes > 1 << 26:
            continue
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(tensors(op(*args)))
        single = tensors(op(*alone(op, args, batch - 1)))
        torch.set_num_threads(before)
        for one, two, five, last in zip(*results, single, strict=True):
            assert torch.equal(one, two), name
            assert torch.equal(one, five), name
            if one.numel():
                assert torch.equal(one[batch - 1 :: batch], last), name


# ----------------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in ON_CPU if op.name != "randn"], ids=lambda op: op.name)
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
            if (op.name, name) == ("conv2d", "weight"):  # what it has for the zeros around a picture is not multiplied
                got, e = got[..., 1:-1, 1:-1], e[..., 1:-1, 1:-1]
            assert torch.equal(got.isnan(), e.isnan()), f"{name}: NaN elsewhere"
            assert torch.equal(got.isinf(), e.isinf()), f"{name}: infinity elsewhere"


# ----------------------------------------------------------------------------------------------------------- the limits


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


# ------------------------------------------------------------------------------------------------- beyond 2^31 elements

BLOCK = 1 << 20


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

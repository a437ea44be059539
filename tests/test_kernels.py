"""What the Triton kernels keep beside their values: a sample's independence, their bounds, every cut."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import pytest
import torch
from one_sample import alone
from rows import LOOKUPS, check_rows_outside
from torch import Tensor
from triton_kernels import DEVICE, KERNELS, interpreted, run, small

import diffkern
from diffkern.available import availability
from diffkern.layout import dense, is_dense
from diffkern.op import OPS
from diffkern.ops.randn import noise_keys, normal
from diffkern.testing import check, make, tensors

if (reason := availability("triton")) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from diffkern.kernels import common, configs

pytestmark = pytest.mark.device

# One sample alone and in a batch


@pytest.mark.parametrize("name", KERNELS)
def test_a_sample_alone_equals_itself_in_a_batch(name):
    by_library = name in (
        "linear",
        "query_key_value",
        "conv2d",
        "conv2d_moments",
    )  # whose products promise it only if they are asked
    for sample in small(name, torch.float16):
        args = sample.args()
        batch = next(len(a) for a in args if isinstance(a, Tensor))
        if batch < 2 or sample.name == "no pixel":
            continue
        i = batch - 1
        with diffkern.batch_invariant() if by_library else contextlib.nullcontext():
            together, parts = run(name, *args), run(name, *alone(OPS[name], args, i))
        for whole, part in zip(together, parts, strict=True):
            if whole.numel():
                expected = whole[[i]] if len(part) == 1 else whole[[i, batch + i]]
                assert torch.equal(part, expected), f"{sample.name}: differs from sample {i} of the batch"


def test_a_batch_may_mix_layouts():
    shape = (2, 3, 6, 6)
    args = list(next(s for s in small("sampler_step", torch.float32) if "square" in s.name).args())
    for i, like in ((0, "contiguous"), (1, "channels_last"), (6, "strided"), (7, "channels_last"), (8, "contiguous")):
        args[i] = make((4, *shape[1:]) if i == 1 else shape, DEVICE, torch.float32, like, seed=i)
    args[9] = make(shape, DEVICE, torch.float32, "channels_last", seed=9)
    args[3], args[4], args[5] = args[3][:2], args[4][:2], args[5][:2]
    check(OPS["sampler_step"], "triton", tuple(args))
    args[0] = args[0].contiguous(memory_format=torch.channels_last)
    check(OPS["sampler_step"], "triton", tuple(args))


# Nothing outside its bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOOKUPS)
def test_a_row_outside_the_table_makes_its_sample_nan(name, dtype):
    """Called without the op, which knows the rows of a tensor on the CPU."""
    kernel = getattr(importlib.import_module(f"diffkern.kernels.{name}"), name)
    check_rows_outside(name, lambda *args: tensors(kernel(*dense(args))), DEVICE, dtype)


def test_a_nan_passes_through_the_clip():
    sample = next(s for s in small("sampler_step", torch.float32) if s.name == "bare")
    args = list(sample.args())
    args[1] = args[1].clone()
    args[1][0, 0, 0, 0] = torch.nan
    assert run("sampler_step", *args)[0].isnan().sum() == 1


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_touches_memory_around_its_tensors(name, monkeypatch):
    """Every tensor lies between NaNs: one read into the result or overwritten is seen."""
    guard, guarded = 4096, []
    plain_empty = torch.empty

    def empty_like(a: Tensor) -> Tensor:
        buffer = plain_empty(a.numel() + 2 * guard, dtype=a.dtype, device=a.device)
        buffer.view(torch.uint8).fill_(0xFF)  # NaN in every float, -1 in integers
        guarded.append((buffer, a.numel()))
        return buffer.as_strided(a.shape, a.stride(), guard)

    def empty(*shape: int, **kwargs: Any) -> Tensor:
        return empty_like(plain_empty(*shape, **kwargs))

    def inside_guards(a: object) -> object:
        return empty_like(a).copy_(a) if isinstance(a, Tensor) and a.numel() and is_dense(a) else a

    for sample in small(name, torch.float32):
        args = sample.args()
        expected = run(name, *args)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", empty_like)
            patch.setattr(torch, "empty", empty)
            got = run(name, *(inside_guards(a) for a in args))
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e), f"{sample.name}: read outside its tensors"
    for buffer, n in guarded:
        edges = torch.cat([buffer[:guard], buffer[guard + n :]]).view(torch.uint8)
        assert (edges == 0xFF).all(), f"wrote outside a tensor of {n} elements"


# Every cut of the products, chosen or not


def _cuts(name: str) -> list[Any]:
    return list(importlib.import_module(f"diffkern.kernels.{name}").CUTS)


@pytest.mark.parametrize(
    ("name", "cut"),
    [pytest.param(n, c, id=f"{n}-{'-'.join(map(str, c))}") for n in ("linear", "conv2d") for c in _cuts(n)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_cut_agrees_with_the_oracle(name, cut, dtype, monkeypatch):
    if DEVICE == "cuda" and getattr(cut, "TMA", True) and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor memory accelerator of sm_90")
    module, taken = importlib.import_module(f"diffkern.kernels.{name}"), []
    plain = module.fused

    def fused(*args: Any) -> Tensor:
        taken.append(args)
        return plain(*args)

    monkeypatch.setattr(module, "fused", fused)
    with configs.trying(lambda kernel, key: cut._asdict() if kernel == name else None):
        for sample in small(name, dtype):
            check(OPS[name], "triton", sample.args())
    assert taken


# Sizes that take special paths


@interpreted
def test_a_batch_larger_than_a_grid_axis(monkeypatch):
    keys = noise_keys(2, 7, DEVICE)
    expected = run("randn", keys, [9], 0, torch.float32, 0)[0]
    monkeypatch.setattr(common, "_GRID_LIMIT", tl.constexpr(3))
    assert common.grid(7, 1) == (1, 3, 3)
    assert torch.equal(run("randn", keys, [9], 0, torch.float32, 0)[0], expected)


@interpreted
def test_elements_beyond_two_to_the_31(monkeypatch):
    """Only the pages that are touched exist: run the last programs of a tensor of more than 2^31 elements."""
    from triton.runtime.interpreter import InterpreterBuilder

    module = importlib.import_module("diffkern.kernels.add_noise")
    n = (1 << 31) + 4096 + 8
    x0 = torch.empty(1, n, dtype=torch.float16)
    x0[:, -4096:] = 0.5
    made: list[Tensor] = []

    def empty_like(a: Tensor) -> Tensor:
        made.append(torch.empty(a.shape, dtype=a.dtype))
        return made[-1]

    chunks = triton.cdiv(n, 2048)
    plain_id = InterpreterBuilder.create_get_program_id

    def program_id(self: InterpreterBuilder, axis: int):
        handle = plain_id(self, axis)
        handle.data = handle.data + (chunks - 2 if axis == 0 else 0)
        return handle

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(module, "grid", lambda batch, chunks: (2, 1, 1))
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
    keys, table = noise_keys(4, 1), torch.tensor([[0.6, 0.8]])
    x_t, _ = module.add_noise(x0, torch.zeros(1, dtype=torch.int64), table, keys, 0, False)
    tail = n % 2048 + 2048
    noise = normal(keys, [tail], 0, torch.float32, offset=n - tail)
    assert torch.equal(x_t[:, -tail:], (0.6 * x0[:, -tail:].float() + 0.8 * noise).half())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 9, 17), 4), ((1, 160, 2, 3), 16), ((2, 9, 5, 5), 3)])
def test_group_norm_over_many_chunks(monkeypatch, layout, shape, groups):
    """Small limits bring the paths of large tensors to small ones: several tiles a chunk, chunks, slabs and parts."""
    module = importlib.import_module("diffkern.kernels.group_norm_cuts")
    monkeypatch.setattr(module, "_ONE_PASS", {})
    monkeypatch.setattr(module, "_TILE", 128)
    x = make(shape, DEVICE, torch.float32, layout) + 50.0
    x.flatten()[0] = 1e3  # an outlier where the shift of the moments is taken
    weight, bias = (make(shape[1:2], DEVICE, torch.float32, seed=s) for s in (1, 2))
    try:
        for chunks in (256, 2):
            monkeypatch.setattr(module, "_CHUNKS", chunks)
            forget(module)
            check(OPS["group_norm_silu"], "triton", (x, groups, weight, bias, 1e-5, True))
            assert module.in_two.cache_info().misses
    finally:
        forget(module)


def forget(module) -> None:
    """The cuts that were made by other limits."""
    module.at_once.cache_clear()
    module.in_two.cache_clear()


@interpreted
@pytest.mark.parametrize("name", KERNELS)
def test_programs_may_run_in_any_order(name, monkeypatch):
    """Two programs that write one element disagree with themselves when run backwards."""
    from triton.runtime.interpreter import InterpreterBuilder

    calls = [s.args() for s in small(name, torch.float32) if s.name.startswith(("odd", "a wide", "with the noise"))]
    forwards = [run(name, *args) for args in calls]
    plain_id = InterpreterBuilder.create_get_program_id

    def program_id(self: InterpreterBuilder, axis: int):
        handle = plain_id(self, axis)
        handle.data = self.grid_dim[axis] - 1 - handle.data
        return handle

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
    for args, expected in zip(calls, forwards, strict=True):
        for g, e in zip(run(name, *args), expected, strict=True):
            assert torch.equal(g, e)


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_cuts_every_shape_completely(channels_last):
    module = importlib.import_module("diffkern.kernels.group_norm_cuts")
    for per_group in (1, 3, 8, 10, 40, 127, 130, 2560):
        for groups in (1, 2, 32):
            for pixels in (1, 49, 1024, 1 << 20):
                cut = module._cut(per_group, pixels, per_group * groups, channels_last)
                assert cut.GROUPS == 1 or cut.PARTS == 1
                assert cut.GROUPS * per_group <= cut.CHANNELS or per_group <= cut.PARTS * cut.CHANNELS
                assert cut.CHANNELS * cut.PIXELS <= module._TILE or cut.PIXELS == 1
                assert cut.CHANNELS & (cut.CHANNELS - 1) == 0 == cut.PIXELS & (cut.PIXELS - 1)

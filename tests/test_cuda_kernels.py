"""The CUDA kernels and their launchers, on a GPU or, thread by thread, on the CPU (cuda_library.py). What only a GPU
has, its approximate functions, is exact on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_library
import pytest
import torch
from one_sample import alone
from rows import LOOKUPS, check_rows_outside
from torch import Tensor

from diffkern.backend import use_backend
from diffkern.layout import is_dense
from diffkern.op import OPS, Sample
from diffkern.ops.randn import Draw, noise_keys, normal
from diffkern.testing import check, tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOISE = ("randn", "add_noise", "reparameterize", "sampler_step")
pytestmark = pytest.mark.device
on_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="runs the kernels thread by thread")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    folder = tmp_path_factory.getbasetemp()
    with cuda_library.loaded(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as path:
        yield path


def run(name: str, *args: object) -> tuple[Tensor, ...]:
    with use_backend("cuda"):
        return tensors(OPS[name](*args))


def small(name: str, dtype: torch.dtype) -> list[Sample]:
    """The small samples that the backend takes."""
    taker = next(b for b in OPS[name].backends if b.name == "cuda")
    samples = [s for s in OPS[name].make_samples(DEVICE, dtype) if not s.workload]  # type: ignore[misc]
    return [s for s in samples if taker.supports is None or taker.supports(*OPS[name].bind(*s.args())) is True]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


CALLS = [
    pytest.param(name, sample, id=f"{name}-{sample.name}-{str(dtype)[6:]}")
    for name in cuda_library.NAMES
    for dtype in DTYPES
    for sample in small(name, dtype)
]


@pytest.mark.parametrize(("name", "sample"), CALLS)
def test_agrees_with_the_oracle(name, sample):
    check(OPS[name], "cuda", sample.args())


@on_cpu
@pytest.mark.parametrize(("name", "sample"), CALLS)
def test_blocks_may_run_in_any_order(name, sample, monkeypatch):
    args = sample.args()
    forwards = run(name, *args)
    monkeypatch.setenv("CUDA_ON_CPU_REVERSED", "1")
    for a, b in zip(forwards, run(name, *args), strict=True):
        same(a, b)


@pytest.mark.parametrize("name", cuda_library.NAMES)
def test_a_sample_alone_equals_itself_in_a_batch(name):
    for sample in small(name, torch.float16):
        args = sample.args()
        batch = next(len(a) for a in args if isinstance(a, Tensor))
        together = run(name, *args)
        i = batch - 1
        if batch < 2:
            continue
        for whole, part in zip(together, run(name, *alone(OPS[name], args, i)), strict=True):
            if whole.numel():
                same(part, whole[[i]] if len(part) == 1 else whole[[i, batch + i]])


@pytest.mark.parametrize("guard", [256, 257])
@pytest.mark.parametrize("name", cuda_library.NAMES)
def test_reads_nothing_around_its_tensors(name, guard):
    """Every tensor lies between NaNs, and begins where a vector can or where none can: one read into the result is
    seen."""

    def inside_guards(a: object) -> object:
        if not isinstance(a, Tensor) or not a.numel() or not is_dense(a):
            return a
        buffer = torch.empty(a.numel() + 2 * guard, dtype=a.dtype, device=a.device)
        buffer.view(torch.uint8).fill_(0xFF)  # NaN in every float, -1 in integers
        return buffer.as_strided(a.shape, a.stride(), guard).copy_(a)

    for sample in small(name, torch.float16):
        args = sample.args()
        guarded = tuple(map(inside_guards, args))
        if guard % 2 and name not in NOISE:  # sums in another order
            check(OPS[name], "cuda", guarded)
            continue
        for a, b in zip(run(name, *args), run(name, *guarded), strict=True):
            same(a, b)


# The noise


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 63, 64, 65, 72, 130])
def test_noise_does_not_depend_on_the_layout(channels):
    for height, width in ((1, 1), (3, 7), (8, 9), (30, 28)):
        shape = (2, channels, height, width)
        keys = noise_keys(3, [5, 1 << 40], DEVICE)
        flat = run("randn", keys, list(shape[1:]), 9, torch.float32, 0)[0]
        assert (flat - normal(keys, shape[1:], 9, torch.float32)).abs().max() < 1e-5
        zeros = torch.zeros(shape, device=DEVICE)
        same(flat, run("reparameterize", zeros, zeros, keys, 9)[0])
        nhwc = zeros.contiguous(memory_format=torch.channels_last)
        same(flat, run("reparameterize", nhwc, nhwc, keys, 9)[0])
        half = nhwc.half()
        same(flat.half(), run("reparameterize", half, half, keys, 9)[0])


def test_seeds_draws_and_ids_of_64_bits():
    ids = [0, 17, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, -1]
    keys = torch.cat([noise_keys(seed, ids, DEVICE) for seed in (0, 1, (1 << 32) + 5, (1 << 64) - 1)])
    for draw, offset in ((0, 0), (int(Draw.PROBE) + 7, ((1 << 32) - 3) * 4), (0xFFFFFFFF, 12345)):
        got = run("randn", keys, [40], draw, torch.float32, offset)[0]
        assert (got - normal(keys, [40], draw, torch.float32, offset)).abs().max() < 1e-5


def test_an_offset_continues_the_stream():
    keys = noise_keys(1, 2, DEVICE)
    for dtype in DTYPES:
        whole = run("randn", keys, [5000], 0, dtype, 0)[0]
        for offset in (1, 2, 3, 4, 2047, 4096, 4999):
            same(run("randn", keys, [5000 - offset], 0, dtype, offset)[0], whole[:, offset:])


def test_many_tiles_a_program_change_nothing():
    """A long sample in one call, where a program takes several tiles, and in pieces, where it takes one."""
    n, copies = (1 << 18) + 500, 66
    keys = noise_keys(1, 1, DEVICE)
    whole = run("randn", keys.expand(copies, 2).contiguous(), [n], 0, torch.float32, 0)[0]
    piece = run("randn", keys, [n], 0, torch.float32, 0)[0]
    same(whole, piece.expand(copies, n))


# Nothing outside its bounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in LOOKUPS if name in cuda_library.NAMES])
def test_a_row_outside_the_table_makes_its_sample_nan(name, dtype):
    check_rows_outside(name, lambda *args: run(name, *args), DEVICE, dtype)


def test_a_nan_passes_through_the_clip():
    sample = next(s for s in small("sampler_step", torch.float32) if s.name == "bare")
    args = list(sample.args())
    args[1] = args[1].clone()
    args[1][0, 0, 0, 0] = torch.nan
    assert run("sampler_step", *args)[0].isnan().sum() == 1


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("randn", {"offset": -1}, "offset is -1"),
    ("randn", {"shape": [3, -4]}, "shape has the size -4"),
    ("randn", {"keys": noise_keys(0, 2)[:, :1]}, r"keys must be contiguous int64 \[2, 2\], got \[2, 1\]"),
    ("add_noise", {"timestep": torch.zeros(2, dtype=torch.int64)}, r"timestep must be contiguous int64 \[3\]"),
    ("add_noise", {"alpha_sigma": torch.zeros(2, 3)}, r"alpha_sigma must be \[T, 2\], got \[2, 3\]"),
    ("reparameterize", {"keys": noise_keys(0, 2)}, r"keys must be contiguous int64 \[3, 2\]"),
    ("sampler_step", {"table": torch.zeros(1, 32)}, "table must be"),
    ("sampler_step", {"guidance": torch.zeros(2)}, r"guidance must be \[3\], got \[2\]"),
    ("sampler_step", {"model_output": torch.zeros(3, 4, 8, 8)}, "model_output must have batch 6"),
    ("sampler_step", {"base": torch.zeros(3, 4, 8, 8).double()}, "base has the wrong dtype"),
]


@pytest.mark.parametrize(("name", "wrong", "sentence"), WRONG)
def test_refuses_with_a_sentence(name, wrong, sentence):
    args = dict(zip(OPS[name].signature.parameters, small(name, torch.float32)[0].args(), strict=True))
    args |= {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in wrong.items()}
    with use_backend("cuda"), pytest.raises(RuntimeError, match=f"diffkern::{name}: .*{sentence}"):
        OPS[name].overload(*args.values())


# What only a GPU can show


@on_gpu
def test_more_samples_than_a_grid_axis_has():
    keys = noise_keys(2, 65535 * 2 + 3, DEVICE)
    got = run("randn", keys, [9], 0, torch.float32, 0)[0]
    for i in (0, 65534, 65535, 65536, 2 * 65535, 2 * 65535 + 2):
        same(got[[i]], run("randn", keys[[i]], [9], 0, torch.float32, 0)[0])


@on_gpu
def test_elements_beyond_two_to_the_31():
    n, tail = (1 << 31) + 4096 + 8, 4096
    keys, table = noise_keys(4, 1, DEVICE), torch.tensor([[0.6, 0.8]], device=DEVICE)
    x0 = torch.full((1, n), 0.5, dtype=torch.float16, device=DEVICE)
    x_t = run("add_noise", x0, torch.zeros(1, dtype=torch.int64, device=DEVICE), table, keys, 0, False)[0]
    noise = normal(keys, [tail], 0, torch.float32, offset=n - tail)
    assert (x_t[:, -tail:] - (0.3 + 0.8 * noise)).abs().max() < 4e-3  # a unit in the last place of the largest


@on_gpu
@pytest.mark.parametrize("name", NOISE)
def test_is_captured_in_a_graph_and_follows_the_stream(name):
    args = next(s for s in small(name, torch.float16) if s.name.startswith("square")).args()
    expected = run(name, *args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for a, b in zip(expected, run(name, *args), strict=True):
            same(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(name, *args)
    for r in results:
        r.fill_(torch.nan)
    graph.replay()
    for a, b in zip(expected, results, strict=True):
        same(a, b)


@on_gpu
def test_approximate_normals_stay_near_float64():
    """The largest and the smallest radius, and everything near the change from logarithm to series, are met in a long
    stream: 2^26 normals have a uniform within 2^-25 of either end."""
    keys = noise_keys(0, 64, DEVICE)
    got = run("randn", keys, [1 << 20], 0, torch.float32, 0)[0]
    worst = max((got[[i]] - normal(keys[[i]], [1 << 20], 0, torch.float64)).abs().max().item() for i in range(64))
    assert worst < 1e-5

"""group_norm_silu in CUDA that reads its input once: how samples are cut for clusters of blocks, and that what the
blocks send each other is right. On a GPU if there is one, else on the CPU as test_cuda_kernels.py does it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_library
import pytest
import torch
from diffkern.kernels import configs
from diffkern.kernels.group_norm_blocks import BLOCKS
from one_sample import alone
from test_cuda_kernels import DEVICE, DTYPES, library, on_cpu, same, small  # noqa: F401
from test_cuda_norms import ALL, group_norm_args, run
from torch import Tensor

from diffkern.op import OPS
from diffkern.testing import check

pytestmark = pytest.mark.device
OP = OPS["group_norm_silu"]
FAR = {"offset": 30.0, "outlier": 300.0}
# (name, KB of a block, shape, groups, what else is given; then the clusters, the blocks of each, a block's threads).
CUTS: list[tuple[str, int, tuple[int, ...], int, dict[str, Any], tuple[int, int, int]]] = [
    ("one block", 16, (2, 144, 3, 3), 2, ALL, (2, 1, 64)),
    ("four vectors a thread", 16, (2, 48, 32, 32), 16, ALL | FAR, (2, 8, 256)),
    ("eight vectors a thread", 32, (2, 48, 32, 32), 16, ALL | FAR, (2, 4, 256)),
    ("twelve vectors a thread", 64, (2, 48, 32, 32), 16, ALL | FAR, (2, 2, 352)),
    ("slabs of one group and more", 16, (2, 1264, 8, 8), 32, ALL, (8, 3, 256)),
    ("slabs that are too large even so", 16, (1, 320, 64, 64), 32, {"offset": 30.0}, (8, 8, 224)),
    ("the last run is shorter", 16, (1, 48, 45, 41), 3, {"modulated": True}, (1, 8, 192)),
    ("more runs than are asked for", 96, (2, 80, 32, 32), 32, {"skip": 16}, (2, 3, 352)),
    ("a group wider than a warp's threads", 16, (1, 5120, 2, 4), 20, {"add": True}, (2, 3, 320)),
    ("more groups than threads", 16, (1, 5120, 3, 3), 5120, {"modulated": True}, (4, 2, 320)),
]


@pytest.fixture(params=BLOCKS, ids=lambda block: f"{block} KB")
def block(request: pytest.FixtureRequest) -> Iterator[int]:
    with configs.trying(lambda kernel, key: {configs.CUDA: request.param}):
        yield request.param


@pytest.mark.parametrize(("name", "kept", "shape", "groups", "more", "expected"), CUTS, ids=[c[0] for c in CUTS])
def test_every_cut(name, kept, shape, groups, more, expected, library: Path | None, monkeypatch):  # noqa: F811
    args = group_norm_args(shape, groups, torch.bfloat16, torch.bfloat16, **more)
    with configs.trying(lambda kernel, key: {configs.CUDA: kept}):
        before = cuda_library.launched(library).kernels if library else 0
        out = run("group_norm_silu", args)
        if library:
            found = cuda_library.launched(library)
            assert (found.kernels - before, found.clusters, found.blocks, found.threads) == (1, *expected)
        check(OP, "cuda", args)
        same(out[-1:], run("group_norm_silu", alone(OP, args, len(out) - 1)))
        monkeypatch.setenv("CUDA_ON_CPU_REVERSED", "1")
        same(out, run("group_norm_silu", args))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_small_sample(dtype, block):
    for sample in small("group_norm_silu", dtype):
        args = sample.args()
        check(OP, "cuda", args)
        if len(args[0]) > 1:
            last = len(args[0]) - 1
            same(run("group_norm_silu", args)[last:], run("group_norm_silu", alone(OP, args, last)))


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_float32_and_parameters_of_another_dtype(dtype, offset, block):
    args = group_norm_args((2, 40, 32, 32), 4, dtype, torch.float32, add=True, modulated=True, offset=offset)
    check(OP, "cuda", args)


@on_cpu
@pytest.mark.parametrize(
    ("shape", "groups", "more", "kernels"),
    [
        ((1, 16, 184, 184), 2, {}, 2),  # more than eight blocks keep
        ((1, 8, 96, 128), 2, {}, 1),
        ((1, 15, 8, 8), 5, {}, 2),  # vectors that share a pixel's last numbers with the next
        ((2, 40, 24, 24), 4, {"chunks": 25}, 2),  # with moments it is read once anyway
    ],
)
def test_what_does_not_fit_is_read_twice(shape, groups, more, kernels, library: Path):  # noqa: F811
    args = group_norm_args(shape, groups, torch.bfloat16, torch.bfloat16, **more)
    with configs.trying(lambda kernel, key: {configs.CUDA: 96}):
        before = cuda_library.launched(library).kernels
        run("group_norm_silu", args)
        assert cuda_library.launched(library).kernels - before == kernels


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_group_and_no_other(value, block):
    args = group_norm_args((2, 32, 48, 40), 4, torch.bfloat16, torch.bfloat16)
    args[0][1, 13, 40, 7] = value
    groups = run("group_norm_silu", args).unflatten(1, (4, 8)).isnan().flatten(2)
    assert groups.all(2).tolist() == groups.any(2).tolist() == [[False] * 4, [False, True, False, False]]


def test_a_block_that_cannot_be_is_refused():
    args = group_norm_args((1, 16, 4, 4), 4, torch.bfloat16, torch.bfloat16)
    for wrong in (-1, 97):
        with pytest.raises(RuntimeError, match=f"a block keeps 1 to 96 KB, or 0 to read its input twice, got {wrong}"):
            torch.ops.diffkern_CUDA.group_norm_silu(*args, wrong)


def test_the_table_says_how_it_is_read(monkeypatch):
    """And whether at all, or by Triton."""
    from diffkern.kernels import group_norm_blocks as kernels

    key = "bytes 2, pixels 64, channels 32, groups 8"
    cuda = next(b for b in OP.backends if b.name == "cuda")
    x = torch.empty(2, 24, 6, 7, dtype=torch.float16).to(memory_format=torch.channels_last)
    skip = x[:, :8].contiguous(memory_format=torch.channels_last)

    def found(**entry: Any) -> tuple[str | None, int]:
        table = {"group_norm_silu": {key: {"shape": {}, "us": 4.0, "torch_us": 9.0} | entry}} if entry else {}
        monkeypatch.setattr(configs, "_table", lambda arch: table)
        configs.is_tuned.cache_clear()
        kernels._found.cache_clear()
        return cuda.why_defer(OP.bind(x, 8, skip=skip)), kernels.cuda_block(x, 8, skip)

    try:
        assert found(cuda_us=3.0, cuda_block=32) == (None, 32)
        assert found(cuda_us=3.0, cuda_block=0) == (None, 0)
        assert found(cuda_us=5.0, cuda_block=16) == ("Triton took 4 us where this took 5", 16)
        assert found(us=4.0) == found() == ("Triton reads a small picture once", 0)
        with configs.trying(lambda kernel, key: {configs.CUDA: 64}):
            assert found()[1] == 64
        assert kernels.cuda_block(x, 8, None) == 0, "another number of channels"
    finally:
        configs.is_tuned.cache_clear()
        kernels._found.cache_clear()


def test_what_is_tried():
    from diffkern.kernels.group_norm_blocks import tuning

    x = torch.empty(2, 24, 6, 7)
    assert tuning(*OP.bind(x, 8), 90)[1] == [{}]  # type: ignore[call-arg]
    facts, shapes = tuning(*OP.bind(x.to(memory_format=torch.channels_last), 8), 90)  # type: ignore[call-arg]
    assert facts == "bytes 4, pixels 64, channels 24, groups 8"
    assert shapes == [{}, {"CUDA": 0}, {"CUDA": 16}, {"CUDA": 32}, {"CUDA": 64}, {"CUDA": 96}]


def test_reads_nothing_around_its_tensors():
    """Each lies between NaNs: one read into the result is seen."""

    def guarded(a: object) -> object:
        if not isinstance(a, Tensor) or not a.numel():
            return a
        buffer = torch.full((a.numel() + 512,), torch.nan, dtype=a.dtype, device=a.device)
        return buffer.as_strided(a.shape, a.stride(), 256).copy_(a)

    with configs.trying(lambda kernel, key: {configs.CUDA: 16}):
        for sample in small("group_norm_silu", torch.float16):
            args = sample.args()
            same(run("group_norm_silu", args), run("group_norm_silu", tuple(map(guarded, args))))

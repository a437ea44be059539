"""Convolutions that give the moments of what they make: in the pass behind a library's, behind sums that are split, and
in our own kernel where its tiles are runs of pixels. On a GPU, else in Triton's interpreter."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.op import OPS
from diffkern.ops.conv2d import check_conv2d
from diffkern.ops.conv2d_moments import chunks_of, moments_of
from diffkern.testing import check, make

if (reason := availability("triton")) is not None:
    pytest.skip(reason, allow_module_level=True)

from diffkern.kernels import configs
from diffkern.kernels.conv2d_cuts import CUTS, gives_moments

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NO_TMA = DEVICE == "cuda" and torch.cuda.get_device_capability() < (9,)


def test_no_chunk_is_empty():
    for pixels in (*range(1, 700), 1 << 16, (1 << 16) + 1, 1000 * 1000 + 7, 1 << 20):
        chunks = chunks_of(pixels)
        length = -(-pixels // chunks)
        assert 1 <= chunks <= 1024
        assert (chunks - 1) * length < pixels <= chunks * length
        assert length >= min(64, pixels)


def compare(y: Tensor, moments: Tensor) -> None:
    """Moments with those of the numbers that they are of."""
    n = y.shape[1]
    expected = moments_of(y.double(), moments.shape[1])
    mean, squares = (moments.double() - expected).abs().unflatten(2, (2, n)).unbind(2)
    assert (mean <= 1e-6 * y.double().abs().max()).all()
    assert (squares <= 1e-5 * expected[:, :, n:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["far from zero", "upsample", "splits"])
def test_moments_are_those_of_what_was_written(way, dtype):
    """An outlier where they are shifted by, among numbers that are far from zero."""
    if way == "splits" and (dtype == torch.float32 or NO_TMA):
        pytest.skip("the kernel takes 16 bits, and the tensor memory accelerator of sm_90")
    x = make((1, 8, 9, 16), DEVICE, dtype, "channels_last")
    weight = make((72, 8, 3, 3), DEVICE, dtype, "channels_last", seed=1) / 12
    bias = make((72,), DEVICE, dtype, seed=2) + (100 if way == "far from zero" else 0)
    x[0, :, 0, 0] *= 50
    kernels = importlib.import_module("diffkern.kernels.conv2d")
    cut = next(c for c in kernels.CUTS if c.SPLITS > 1)._asdict() if way == "splits" else {}
    with use_backend("triton"), configs.trying(lambda kernel, key: cut if kernel == "conv2d" else None):
        y, moments = diffkern.conv2d_moments(x, weight, bias, upsample=way == "upsample")
    assert moments.shape[1] > 1
    compare(y, moments)


# Our own kernel, whose tile is a run of pixels where it fits the picture

UNSPLIT = [cut for cut in CUTS if cut.SPLITS == 1]
# Shape of the input, results, taps, and what else. Tiles of whole rows, of one row, and of a part of a row; a picture
# that is one tile of the smallest cut, and no whole one of others; channels that fill no last tile.
FITTING: dict[str, tuple[tuple[int, ...], int, int, str]] = {
    "rows": ((2, 8, 8, 16), 208, 3, "bias"),
    "everything": ((3, 8, 8, 32), 144, 3, "bias add residual silu"),
    "add alone": ((2, 16, 8, 16), 48, 3, "add"),
    "a row": ((2, 8, 2, 128), 64, 3, "residual"),
    "half a row": ((1, 8, 1, 256), 80, 1, "bias residual"),
    "no padding": ((2, 8, 10, 18), 32, 3, "bias valid"),
}
# Heights and widths that tiles do not cover, chunks that are larger than a tile, tiles of two pictures, channels that
# 16 does not divide, doubled pictures, strides.
OTHERS: dict[str, tuple[tuple[int, ...], int, int, str]] = {
    "low": ((2, 8, 9, 16), 32, 3, "bias residual"),
    "narrow": ((2, 8, 16, 24), 32, 3, "bias add"),
    "two pictures": ((2, 8, 4, 8), 32, 3, "bias"),
    "channels": ((2, 8, 8, 16), 72, 3, "bias residual"),
    "doubled": ((2, 8, 8, 16), 32, 3, "bias upsample"),
    "stride": ((2, 8, 16, 32), 32, 3, "bias residual stride"),
}


def arguments(shape: tuple[int, ...], n: int, taps: int, extras: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of the op: an outlier among numbers that are far from zero where there is a bias."""
    x = make(shape, DEVICE, dtype, "channels_last")
    x[0, :, 0, 0] *= 50
    weight = make((n, shape[1], taps, taps), DEVICE, dtype, "channels_last", seed=1) / (shape[1] ** 0.5 * taps)
    bias = make((n,), DEVICE, dtype, seed=2) + 100 if "bias" in extras else None
    add = make((shape[0], n), DEVICE, dtype, seed=3) if "add" in extras else None
    stride, padding = 2 if "stride" in extras else 1, [0] if "valid" in extras else None
    activation, upsample = "silu" if "silu" in extras else "none", "upsample" in extras
    call = x, weight, bias, stride, padding, add, None, activation, upsample
    size = tuple(check_conv2d("conv2d_moments", *call))
    residual = make(size, DEVICE, dtype, "channels_last", seed=4) if "residual" in extras else None
    return (*call[:6], residual, activation, upsample)


@pytest.fixture
def ways(monkeypatch):
    """What has run, in order: our own kernel, and the pass behind that or behind the library's."""
    if NO_TMA:
        pytest.skip("needs the tensor memory accelerator of sm_90")
    module, taken = importlib.import_module("diffkern.kernels.conv2d"), []

    def counted(name: str) -> None:
        plain = getattr(module, name)

        def run(*args: Any, **more: Any) -> Any:
            taken.append(name)
            return plain(*args, **more)

        monkeypatch.setattr(module, name, run)

    counted("fused")
    counted("epilogue")
    return taken


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("cut", UNSPLIT, ids=lambda cut: "-".join(map(str, cut)))
@pytest.mark.parametrize("case", FITTING)
def test_a_tile_that_is_runs_of_pixels_gives_moments(ways, case, cut, dtype):
    """With no pass behind the kernel; of one sample in a batch, those that it has alone."""
    args = arguments(*FITTING[case], dtype)
    with use_backend("triton"), configs.trying(lambda kernel, key: cut._asdict() if kernel == "conv2d" else None):
        y, moments = diffkern.conv2d_moments(*args)
        assert ways == ["fused"]
        x, weight, bias, stride, padding, add, residual, *rest = args
        add, residual = (None if t is None else t[-1:] for t in (add, residual))
        alone = diffkern.conv2d_moments(x[-1:], weight, bias, stride, padding, add, residual, *rest)
        assert torch.equal(alone[1], moments[-1:])
        assert ways == ["fused"] * 2
        check(OPS["conv2d_moments"], "triton", args)
    compare(y, moments)
    assert moments.shape[1] > 1


@pytest.mark.parametrize("case", OTHERS)
def test_where_tiles_are_no_runs_a_pass_behind_gives_moments(ways, case):
    args = arguments(*OTHERS[case], torch.bfloat16)
    cut = UNSPLIT[0]._asdict()
    with use_backend("triton"), configs.trying(lambda kernel, key: cut if kernel == "conv2d" else None):
        y, moments = diffkern.conv2d_moments(*args)
    assert ways == ["epilogue"]
    compare(y, moments)


def test_which_tiles_are_runs():
    """As a picture's size and a tile's have it; in particular of large pictures, whose chunks are larger."""

    def given(height: int, width: int, rows: int) -> bool:
        x, weight = torch.empty(1, 8, height, width, device="meta"), torch.empty(16, 8, 3, 3, device="meta")
        cut = UNSPLIT[0]._replace(ROWS=rows)
        return gives_moments(cut, x, weight, (1, 1, 1, 1), False, chunks_of(height * width))

    assert all(given(side, side, rows) for side in (16, 32, 64, 128, 256) for rows in (64, 128))
    assert [given(8, 8, rows) for rows in (64, 128)] == [True, False]
    assert [given(256, 512, rows) for rows in (64, 128)] == [False, True], "chunks of 128 pixels"
    assert not any(given(512, 512, rows) for rows in (64, 128)), "chunks of 256"
    assert not given(1025, 64, 64), "chunks of 65 pixels, the last of 15"
    assert [given(6, 32, rows) for rows in (64, 128)] == [True, False]
    assert not given(96, 96, 64)


def test_a_cut_with_moments_comes_before_that_of_the_convolution(ways):
    args = arguments(*FITTING["rows"], torch.bfloat16)
    shapes = {"conv2d": {}, "conv2d_moments": {"MOMENTS": 1, **UNSPLIT[0]._asdict()}}
    with use_backend("triton"), configs.trying(lambda kernel, key: shapes.get(kernel)):
        diffkern.conv2d_moments(*args)
        assert ways == ["fused"]
        diffkern.conv2d(*args)
        assert ways == ["fused", "epilogue"], "without moments it is the library's"

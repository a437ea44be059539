"""The norms in CUDA on sizes that the samples of their ops are too small for: every way to cut a sample. On a GPU if
there is one, else on the CPU as test_cuda_kernels.py does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cuda_kernels import DEVICE, library  # noqa: F401
from torch import Tensor

from diffkern.backend import use_backend
from diffkern.op import OPS
from diffkern.ops.conv2d_moments import moments_of
from diffkern.testing import check, make

pytestmark = pytest.mark.device
ALL = {"skip": 16, "add": True, "modulated": True}
# (name, shape, groups, what else is given), all channels_last.
GROUPS: list[tuple[str, tuple[int, ...], int, dict[str, Any]]] = [
    ("one run a sample", (2, 144, 3, 3), 2, ALL),
    ("several rows of pixels a block", (2, 40, 64, 64), 4, ALL | {"offset": 30.0}),
    ("one row, a run of few pixels", (2, 1264, 8, 8), 32, ALL),
    ("the last run is shorter", (1, 48, 45, 41), 3, {"modulated": True}),
    ("two slabs, the last narrower", (1, 4136, 4, 3), 47, {"add": True}),
    ("two slabs of one channel a group", (1, 5120, 3, 3), 5120, {"modulated": True}),
    ("more runs than a thread reads at a time", (1, 16, 184, 184), 2, ALL | {"offset": 30.0}),
    ("one number at a time", (1, 15, 64, 65), 5, {"modulated": True, "add": True}),
    ("one number at a time, two slabs", (1, 770, 7, 5), 77, {"offset": 30.0}),
    ("the first pixel is far from the others", (1, 32, 24, 24), 4, {"outlier": 300.0}),
    ("moments, more than threads", (2, 40, 24, 24), 4, ALL | {"offset": 30.0, "chunks": 25}),
    ("moments, two slabs, the last narrower", (1, 4136, 4, 3), 47, {"add": True, "chunks": 5}),
    ("moments, one number at a time", (2, 15, 13, 13), 15, {"modulated": True, "add": True, "chunks": 100}),
]
WIDTHS = (512, 1000, 1152, 2048, 3072, 4096, 8192)  # one for each kernel


def group_norm_args(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, parameters: torch.dtype,
    skip: int = 0, add: bool = False, modulated: bool = False, offset: float = 0.0, outlier: float = 0.0,
    chunks: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    batch, own, *space = shape
    channels = own + skip
    weight, bias = (make((channels,), DEVICE, parameters, seed=s) for s in (1, 2))
    added = make((batch, channels), DEVICE, parameters, seed=3) if add else None
    scale, shift = (make((batch, channels), DEVICE, parameters, seed=s) if modulated else None for s in (4, 5))
    second = make((batch, skip, *space), DEVICE, dtype, "channels_last", seed=6) + offset if skip else None
    x = make(shape, DEVICE, dtype, "channels_last") + offset
    x[..., :1, :1] += outlier
    # Runs of pixels have moments of their own: pooled with a wrong weight, they must show.
    x += torch.linspace(0, 4, x[0, 0].numel(), device=DEVICE).view(space).to(dtype)
    moments, of_skip = (moments_of(t, chunks) if chunks and t is not None else None for t in (x, second))
    return x, groups, weight, bias, 1e-5, True, added, scale, shift, second, moments, of_skip


def run(name: str, args: tuple[Any, ...]) -> Tensor:
    with use_backend("cuda"):
        return OPS[name].overload(*args)


@pytest.mark.parametrize(("name", "shape", "groups", "more"), GROUPS, ids=[g[0] for g in GROUPS])
def test_every_cut_of_a_group_norm(name, shape, groups, more):
    args = group_norm_args(shape, groups, torch.bfloat16, torch.bfloat16, **more)
    check(OPS["group_norm_silu"], "cuda", args)
    last = [a[-1:] if isinstance(a, Tensor) and a.dim() > 1 else a for a in args]
    assert torch.equal(run("group_norm_silu", args)[-1:], run("group_norm_silu", tuple(last)))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32_and_parameters_of_another_dtype(offset):
    for dtype in (torch.float32, torch.float16):
        args = group_norm_args((2, 40, 32, 32), 4, dtype, torch.float32, add=True, modulated=True, offset=offset)
        check(OPS["group_norm_silu"], "cuda", args)


def test_the_norm_takes_the_moments_that_it_is_given():
    """Where these say that it is normalised already, it is left as it is; what does not fit is refused."""
    x = make((2, 16, 5, 7), DEVICE, torch.float32, "channels_last") * 3 + 4
    moments = torch.tensor([0.0, 35.0], device=DEVICE).repeat_interleave(16).expand(2, 1, 32).contiguous()
    torch.testing.assert_close(run("group_norm_silu", norm(x, moments)), x, rtol=1e-5, atol=1e-5)
    for wrong, sentence in (
        (moments[:, :, 1:], r"moments must be \[2, 1, 32\], got \[2, 1, 31\]"),
        (moments.expand(2, 36, 32), r"moments must be \[2, chunks of pixels, 32\], got \[2, 36, 32\]"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            run("group_norm_silu", norm(x, wrong.contiguous()))


def norm(x: Tensor, moments: Tensor) -> tuple[Any, ...]:
    return OPS["group_norm_silu"].bind(x, 4, silu=False, moments=moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", ["same", "float32"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_a_row(width, parameters, dtype):
    other = dtype if parameters == "same" else torch.float32
    x, y = make((2, 3, width), DEVICE, dtype), make((2, 3, width), DEVICE, dtype, seed=1)
    gate, shift, scale = (make((2, width), DEVICE, other, seed=s) for s in (2, 3, 4))
    weight, bias = (make((width,), DEVICE, other, seed=s) for s in (5, 6))
    check(OPS["layer_norm_modulate"], "cuda", (x, shift, scale, weight, bias, 1e-6))
    check(OPS["layer_norm_modulate"], "cuda", (x, None, None, weight, bias, 1e-6))
    check(OPS["layer_norm_modulate"], "cuda", (x, None, None, None, bias, 1e-6))
    check(OPS["gate_residual_norm_modulate"], "cuda", (x, y, gate, shift, scale, None, None, 1e-6))
    check(OPS["gate_residual_norm_modulate"], "cuda", (x, y, gate, shift, scale, weight, None, 1e-6))


def test_what_is_left_to_triton():
    def why_not(name: str, *args: Any) -> str | bool:
        backend = next(b for b in OPS[name].backends if b.name == "cuda")
        return backend.supports(*OPS[name].bind(*args))  # type: ignore[misc]

    assert why_not("layer_norm_modulate", torch.empty(1, 1, 8192)) is True
    assert why_not("layer_norm_modulate", torch.empty(1, 1, 8193)) == "takes at most 8192 channels"
    last = torch.empty(2, 642, 2, 2).to(memory_format=torch.channels_last)
    assert why_not("group_norm_silu", last[:, :640].contiguous(memory_format=torch.channels_last), 2) is True
    assert why_not("group_norm_silu", last, 2) == "takes at most 320 channels a group"
    assert "channels_last" in str(why_not("group_norm_silu", last.contiguous(), 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_group_and_no_other(value):
    args = group_norm_args((2, 32, 48, 40), 4, torch.bfloat16, torch.bfloat16)
    args[0][1, 13, 40, 7] = value
    groups = run("group_norm_silu", args).unflatten(1, (4, 8)).isnan().flatten(2)
    assert groups.all(2).tolist() == groups.any(2).tolist() == [[False] * 4, [False, True, False, False]]

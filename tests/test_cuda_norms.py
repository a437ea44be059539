"""The norms in CUDA on sizes that the samples of their ops are too small for: every way to cut a sample. On a GPU if
there is one, else on the CPU as test_cuda_kernels.py does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cuda_kernels import DEVICE, library  # noqa: F401
from torch import Tensor

from diffkern.op import OPS, use_backend
from diffkern.testing import check, make

pytestmark = pytest.mark.device
ALL = {"skip": 16, "add": True, "modulated": True}
# (name, shape, groups, layout, what else is given), for bfloat16 on a GPU with clusters.
GROUPS: list[tuple[str, tuple[int, ...], int, str, dict[str, Any]]] = [
    ("a cluster of 8", (2, 40, 64, 64), 4, "channels_last", {}),
    ("a cluster of 4", (2, 64, 32, 32), 4, "channels_last", ALL),
    ("a cluster of 2, one group a slab", (2, 144, 15, 15), 2, "channels_last", ALL),
    ("a cluster, the last block has less", (1, 48, 45, 41), 3, "channels_last", {"modulated": True}),
    ("narrow slabs, many vectors a thread", (1, 32, 128, 128), 4, "channels_last", {"offset": 30.0}),
    ("the last slab is narrower", (2, 72, 16, 16), 9, "channels_last", {}),
    ("two passes", (1, 64, 184, 184), 4, "channels_last", ALL | {"offset": 30.0}),
    ("two passes, one number at a time", (1, 15, 64, 65), 5, "channels_last", {"modulated": True}),
    ("a block a group", (2, 24, 16, 16), 3, "contiguous", {"add": True}),
    ("a cluster a group", (2, 16, 64, 64), 4, "contiguous", ALL),
    ("two passes over a group", (1, 8, 256, 264), 1, "contiguous", {"add": True, "offset": 30.0}),
]
WIDTHS = (512, 1000, 1152, 2048, 3072, 4096, 8192)  # one for each kernel


def group_norm_args(
    shape: tuple[int, ...], groups: int, layout: str, dtype: torch.dtype, parameters: torch.dtype,
    skip: int = 0, add: bool = False, modulated: bool = False, offset: float = 0.0,
) -> tuple[Any, ...]:  # fmt: skip
    batch, own, *space = shape
    channels = own + skip
    weight, bias = (make((channels,), DEVICE, parameters, seed=s) for s in (1, 2))
    added = make((batch, channels), DEVICE, parameters, seed=3) if add else None
    scale, shift = (make((batch, channels), DEVICE, parameters, seed=s) if modulated else None for s in (4, 5))
    second = make((batch, skip, *space), DEVICE, dtype, layout, seed=6) + offset if skip else None
    x = make(shape, DEVICE, dtype, layout) + offset
    return x, groups, weight, bias, 1e-5, True, added, scale, shift, second


def run(name: str, args: tuple[Any, ...]) -> Tensor:
    with use_backend("cuda"):
        return OPS[name].overload(*args)


@pytest.mark.parametrize("major", [9, 8])
@pytest.mark.parametrize(("name", "shape", "groups", "layout", "more"), GROUPS, ids=[g[0] for g in GROUPS])
def test_every_cut_of_a_group_norm(name, shape, groups, layout, more, major, monkeypatch):
    if major == 8 and (DEVICE == "cuda" or "cluster" not in name):
        pytest.skip("only a cluster is cut otherwise without clusters")
    monkeypatch.setenv("CUDA_ON_CPU_MAJOR", str(major))
    args = group_norm_args(shape, groups, layout, torch.bfloat16, torch.bfloat16, **more)
    check(OPS["group_norm_silu"], "cuda", args)
    last = [a[-1:] if isinstance(a, Tensor) and a.dim() > 1 else a for a in args]
    assert torch.equal(run("group_norm_silu", args)[-1:], run("group_norm_silu", tuple(last)))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_float32_and_parameters_of_another_dtype(layout):
    for dtype in (torch.float32, torch.float16):
        args = group_norm_args((2, 40, 32, 32), 4, layout, dtype, torch.float32, add=True, modulated=True)
        check(OPS["group_norm_silu"], "cuda", args)


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
    check(OPS["rms_norm"], "cuda", (x, weight, 1e-6))


def test_what_is_too_wide_is_left_to_triton():
    def why_not(name: str, *args: Any) -> str | bool:
        backend = next(b for b in OPS[name].backends if b.name == "cuda")
        return backend.supports(*OPS[name].bind(*args))  # type: ignore[misc]

    assert why_not("rms_norm", torch.empty(1, 8192)) is True
    assert why_not("rms_norm", torch.empty(1, 8193)) == "takes at most 8192 channels"
    assert why_not("group_norm_silu", torch.empty(1, 1024, 2, 2), 2) is True
    assert why_not("group_norm_silu", torch.empty(1, 1026, 2, 2), 2) == "takes at most 512 channels a group"

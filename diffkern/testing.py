"""How a backend is judged: sample inputs, the float64 oracle, and the tolerance rule. Shared by tests and benchmarks.

A backend passes when its error against the oracle (the reference, run in float64 on the same values) is at most twice
the error that the reference itself makes in the op's dtype, plus one unit in the last place. In float32 on a GPU it is
five times, plus three units: there exponentials, logarithms, sines and roots are instructions of two ulp and more, and
PyTorch's own attention makes up to 4.8 times the error of its composition, and two ulp where that makes none (on an
H200).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from diffkern.backend import use_backend
from diffkern.op import Op

SHAPES = (
    ("square", (3, 4, 8, 8), "contiguous"),
    ("square, channels_last", (3, 4, 8, 8), "channels_last"),
    ("strided", (2, 3, 6, 5), "strided"),
    ("odd", (5, 3, 7, 5), "contiguous"),
    ("odd, channels_last", (5, 3, 7, 5), "channels_last"),
    ("one element", (1, 1, 1, 1), "contiguous"),
    ("no sample", (0, 3, 4, 4), "contiguous"),
    ("no pixel", (2, 3, 0, 4), "contiguous"),
    ("a vector", (3, 37), "contiguous"),
    ("a video", (2, 3, 2, 5, 5), "contiguous"),
)
"""Small shapes and layouts that every elementwise op is tried on: (name, shape, layout)."""


def make(shape: tuple[int, ...], device: str, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Normal values of a shape in a layout: "contiguous", "channels_last" or "strided" (every second element). They
    are drawn in float32, rounded to dtype, and the same on every device; but a GPU draws millions itself, sooner."""
    source = device if torch.device(device).type == "cuda" and prod(shape) >= 1 << 20 else "cpu"
    generator = torch.Generator(source).manual_seed(seed)
    if layout == "strided":
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, device=source)
        return wide.to(device, dtype)[..., ::2]
    x = torch.randn(shape, generator=generator, device=source).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the same call in float64."""

    def wide(a: Any) -> Any:
        if isinstance(a, torch.dtype):
            return torch.float64
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(map(wide, args))


def oracle(op: Op, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference in float64, on the values of `args`, rounded nowhere."""
    return tensors(op.reference(*widened(args)))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of `dtype` at the magnitude of x, in float64."""
    info = torch.finfo(dtype)
    magnitude = x.abs().double().clamp(min=info.smallest_normal)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def poison(device: str) -> None:
    """Leave NaN in the memory that the next outputs will be made of, so that an element never written shows."""
    blocks = [torch.full((size,), torch.nan, device=device) for size in (1 << 8, 1 << 12, 1 << 16) for _ in range(4)]
    del blocks


def check(op: Op, backend: str, args: tuple[Any, ...]) -> float:
    """Run one call on a forced backend and judge it. Returns the worst error as a share of what is allowed; raises
    AssertionError with the figures when it is above 1, or when shape, dtype or strides differ from the reference's."""
    args = op.bind(*args)
    expected, plain = oracle(op, args), tensors(op.reference(*args))
    poison(next((a.device.type for a in args if isinstance(a, Tensor)), "cpu"))
    with use_backend(backend):
        got = tensors(op.overload(*args))
    return judge(f"{op.name} on {backend}", got, plain, expected)


def judge(
    what: str, got: tuple[Tensor, ...], plain: tuple[Tensor, ...], expected: tuple[Tensor, ...], times: float = 2
) -> float:
    """`check` of the results that a call gave: `plain` are the reference's, `expected` the oracle's. Where both are NaN
    or infinite, these must not be finite either. times: the reference's errors that one may be."""
    assert len(got) == len(expected), f"{what}: {len(got)} results, the reference has {len(expected)}"
    worst = 0.0
    for i, (g, p, e) in enumerate(zip(got, plain, expected, strict=True)):
        where = f"{what}, result {i}"
        assert (g.shape, g.dtype, g.device) == (p.shape, p.dtype, p.device), f"{where}: {g.shape} {g.dtype} {g.device}"
        strides = [(a, b) for a, b, n in zip(g.stride(), p.stride(), p.shape, strict=True) if n > 1 and p.numel()]
        assert all(a == b for a, b in strides), f"{where}: strides {g.stride()}, the reference has {p.stride()}"
        finite, known = e.to(g.dtype).isfinite(), p.isfinite()
        if not (finite & known).all():
            hidden = g.isfinite() & ~finite & ~known
            assert not hidden.any(), f"{where}: {g[hidden][0]} where the oracle has {e[hidden][0]}"
            # Where only one of them is finite, a sum in float32 overflows, or a library leaves out products with zero.
            g, p, e = (t[finite & known] for t in (g, p, e))
        if not g.numel():
            continue
        more, units = (2.5, 3) if g.is_cuda and g.dtype == torch.float32 else (1, 1)
        allowed = more * times * (p.double() - e).abs().max() + units * ulp(e, g.dtype)
        share = ((g.double() - e).abs() / allowed).nan_to_num(nan=torch.inf).max().item()
        assert share <= 1, f"{where}: error {(g.double() - e).abs().max():.3g}, {share:.3g} times what is allowed"
        worst = max(worst, share)
    return worst

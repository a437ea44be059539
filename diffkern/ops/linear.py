"""The linear layer with what follows it in a transformer block: an activation, among them the gated linear units GEGLU
and SwiGLU (Shazeer 2020), adaLN's gate (Peebles & Xie 2023) and the residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import shaped, unfit
from diffkern.invariant import apart, is_on, rows
from diffkern.layout import accumulate, fast_dtype, joined, of_one_dtype
from diffkern.op import Backend, Cost, Sample, for_gpu, op
from diffkern.packing import compute_dtype, packed, vectors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "geglu": lambda y: _halves(y, F.gelu),
    "swiglu": lambda y: _halves(y, F.silu),
}
GATED = ("geglu", "swiglu")
_NUMBER = {name: i for i, name in enumerate(ACTIVATIONS)}  # of an activation, in C++


def _halves(y: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    value, gate = y.chunk(2, dim=-1)
    return value * activation(gate)


def activate(y: Tensor, activation: str) -> Tensor:
    """An activation by its name. Raises RuntimeError naming those there are."""
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"activation is {activation!r}, allowed are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation](y)


def _gate_rows(gate: Tensor, x: Tensor) -> Tensor:
    """gate [B, N] beside x [B, ..., K]."""
    return gate.reshape(gate.shape[0], *(1,) * (x.dim() - 2), gate.shape[-1])


@op
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T + bias) * gate + residual, rounded once.

    x: [B, ..., K]. weight: [N, K], bias: [N] or None; twice as many rows for "geglu" and "swiglu", whose result is
    value * gelu(g) or value * silu(g) with the first half of the features as value and the second as g. activation:
    "none", "silu", "gelu", "gelu_tanh", "geglu" or "swiglu". residual: [B, ..., N] or None. gate: [B, N] or None, one
    row a sample. Returns [B, ..., N], contiguous, dtype of x."""
    acc = accumulate(x.dtype)
    y = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    y = activate(y, activation)
    if gate is not None:
        y = y * _gate_rows(gate, x).to(acc)
    if residual is not None:
        y = y + residual.to(acc)
    return y.to(x.dtype).contiguous()


def _one_dtype(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> bool | str:
    return of_one_dtype(x, weight, bias, residual, gate)


def _supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> bool | str:
    same = of_one_dtype(x, weight, bias, residual, gate)
    return fast_dtype(x.dtype) if same is True else same


@linear.checks
def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> list[int]:
    """The shape of the result. Raises RuntimeError with a sentence if the arguments do not fit together."""
    if x.dim() < 2:
        unfit("linear", "x", "[B, ..., K]", x.shape)
    if activation not in ACTIVATIONS:
        unfit("linear", "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    rows, k = f"{'2 ' * (activation in GATED)}N", x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k or (activation in GATED and weight.shape[0] % 2):
        unfit("linear", "weight", f"[{rows}, {k}]", weight.shape)
    shaped("linear", "bias", bias, weight.shape[0])
    n = weight.shape[0] // (2 if activation in GATED else 1)
    shape = [*x.shape[:-1], n]
    shaped("linear", "residual", residual, *shape)
    shaped("linear", "gate", gate, x.shape[0], n)
    return shape


# The activations that oneDNN applies to its accumulators: its name, scalars and algorithm. Its tanh form of GELU takes
# longer than the epilogue's pass over memory, 1.2 times as long for the whole layer.
_POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
}
# The number of rows that a weight is packed for. The layout is that of all larger numbers and as good for 36; the one
# for a single row is 2 to 10 % slower from 1024 rows on.
_ROWS = 256
# Beyond this many features oneDNN sums a single row in another order than the rows of a batch: it is given two.
_LONG = 1024
# Up to so many features a layer is ours whose activation oneDNN leaves to another pass.
_SHORT = 1024


@linear.backend("cpu", devices=("cpu",), supports=_supports, strided=True)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    shape = _check(x, weight, bias, activation, residual, gate)
    if not x.numel() or not weight.numel():
        return compose(x, weight, bias, activation, residual, gate)
    return multiply(x, [weight], bias, activation, residual, gate, shape)


def ours(x: Tensor, weight: Tensor, activation: str, gated: bool) -> bool:
    """Whether diffkern's own product computes this layer, as fast as oneDNN's or faster. gated: with adaLN's gate. The
    batch has no say: a sample alone must come out as it does in a batch, which is why all layers are ours under
    `batch_invariant()`."""
    if vectors() == "AVX2":  # oneDNN's runs at three quarters of the machine's rate there, ours at nine tenths
        return True
    native = x.dtype != torch.float32 and compute_dtype(x.dtype) == x.dtype
    if vectors() != "AVX512" or (native and torch.cpu._is_amx_tile_supported()):
        return False
    # Rows that are samples, as of a time embedding, are few: to begin takes oneDNN longer. Of 16-bit types without
    # instructions, and for what is no post-op of its own, it passes over more memory: that weighs where sums are short.
    # With a gate its error in float32, of one long sum, is more than a backend may have.
    another = activation in GATED or (native and activation not in _POST_OPS)
    short = another and weight.shape[1] <= _SHORT
    return x.dim() == 2 or compute_dtype(x.dtype) != x.dtype or short or gated or is_on()


def multiply(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, activation: str, residual: Tensor | None,
    gate: Tensor | None, shape: list[int],
) -> Tensor:  # fmt: skip
    """The arguments of the op, of weights side by side, and the shape of the result."""
    # Side by side in memory too: oneDNN reads a bias as if its numbers were.
    bias, residual, gate = (None if t is None else t.contiguous() for t in (bias, residual, gate))
    if ours(x, weights[0], activation, gate is not None):
        halves = activation in GATED
        panels = torch.ops.diffkern_C.panels
        copy = packed(weights, ("panels", halves), lambda: panels(joined(weights).detach().contiguous(), halves))
        product = torch.ops.diffkern_C.linear.default
        return product(x.contiguous(), copy, shape[-1], bias, _NUMBER[activation], gate, residual)
    copy = packed(weights, ("linear", compute_dtype(x.dtype)), lambda: _pack(joined(weights).detach()))
    return _by_onednn(x, copy, bias, activation, residual, gate, shape)


def _by_onednn(
    x: Tensor, copy: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None,
    shape: list[int],
) -> Tensor:  # fmt: skip
    dtype, product = compute_dtype(x.dtype), torch.ops.mkldnn._linear_pointwise
    if dtype != x.dtype and bias is not None:
        bias = bias.to(dtype)
    rows, k = x.to(dtype) if dtype != x.dtype else x, x.shape[-1]
    alone = x.numel() == k > _LONG
    if alone:
        rows = rows.reshape(1, k).expand(2, k)
        residual = None if residual is None else residual.reshape(1, -1).expand(2, -1).contiguous()
    rows = rows if rows.is_contiguous() else rows.contiguous()
    fused = dtype == x.dtype and gate is None
    if fused and residual is None and activation in _POST_OPS:
        y = product.default(rows, copy, bias, *_POST_OPS[activation])
        return y[:1].view(shape) if alone else y
    if fused and residual is not None and activation == "none":
        y = product.binary(rows, residual, copy, bias, "add")
        return y[:1].view(shape) if alone else y
    y = product.default(rows, copy, bias, *_POST_OPS["none"])
    y, residual = (y[:1], residual if residual is None else residual[:1]) if alone else (y, residual)
    out = torch.empty(shape, dtype=x.dtype) if dtype != x.dtype or activation in GATED else y
    torch.ops.diffkern_C.epilogue(out, y, None, _NUMBER[activation], gate, residual)
    return out.view(shape) if alone else out


def _pack(weight: Tensor) -> Tensor:
    """A weight [N, K] as oneDNN multiplies with it, in the dtype that its products are computed in."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(compute_dtype(weight.dtype)).contiguous(), _ROWS)


# cuBLAS's product, with what it can do itself, and one pass for the rest.
@linear.backend("triton", devices=("cuda",), supports=_supports, strided=True)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    from diffkern.kernels.linear import linear as kernel

    if not x.numel() or not weight.numel():
        return compose(x, weight, bias, activation, residual, gate)
    bias, residual, gate = (None if t is None else t.contiguous() for t in (bias, residual, gate))
    return kernel(x.contiguous(), weight, bias, activation, residual, gate)


@linear.gradient
@linear.backend("torch", devices=("cpu", "cuda"), supports=_one_dtype, strided=True)
def compose(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    """PyTorch's kernels in the tensors' own dtype: the reference's float32 copies would cost more than they give."""
    y = activate(F.linear(x, weight, bias), activation)
    y = y if gate is None else y * _gate_rows(gate, x)
    return (y if residual is None else y + residual).contiguous()


@linear.batch_invariant
def _(
    run: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None,
    gate: Tensor | None,
) -> Tensor:  # fmt: skip
    if run.name == "cpu" and ours(x, weight, activation, gate is not None):
        return run(x, weight, bias, activation, residual, gate)
    alone = rows if x.dim() == 2 else apart
    return alone(lambda x, r, g: run(x, weight, bias, activation, r, g), x, residual, gate)


@linear.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, ...], n: int, activation: str = "none", extras: str = "bias",
        layout: str = "contiguous", workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            rows = n * (2 if activation in GATED else 1)
            weight = (
                make((rows, shape[-1]), device, dtype, "strided" if layout == "strided" else "contiguous", seed=1)
                / max(1, shape[-1]) ** 0.5
            )
            bias = make((rows,), device, dtype, seed=2) if "bias" in extras else None
            residual = make((*shape[:-1], n), device, dtype, layout, seed=3) if "residual" in extras else None
            gate = make((shape[0], n), device, dtype, seed=4) if "gate" in extras else None
            return make(shape, device, dtype, layout), weight, bias, activation, residual, gate

        return Sample(name, args, workload)

    yield sample("plain", (3, 5, 24), 16)
    for activation in ACTIVATIONS:
        yield sample(f"{activation}, odd", (3, 7, 33), 17, activation, "")
        yield sample(f"{activation}, everything", (2, 5, 40), 24, activation, "bias residual gate")
    yield sample("residual", (2, 9, 32), 48, extras="bias residual")
    yield sample("gated, of whole tiles", (2, 9, 32), 24, "geglu", "bias residual gate")
    yield sample("gate", (3, 4, 16), 8, extras="gate")
    yield sample("strided", (3, 6, 20), 12, "gelu", "bias residual", layout="strided")
    yield sample("rows", (5, 64), 10, "silu", "bias gate residual")
    yield sample("a picture", (2, 3, 5, 8), 6, "none", "gate residual", layout="channels_last")
    yield sample("a long row", (3, 1, 1100), 7, "gelu")  # of a batch and alone: oneDNN has two kernels
    yield sample("wider than a run", (2, 2, 8), 1040, "geglu", "bias residual gate")
    yield sample("one element", (1, 1, 1), 1)
    yield sample("no sample", (0, 3, 8), 4, "silu", "bias residual gate")
    yield sample("no token", (2, 0, 8), 4, "geglu")
    yield sample("DiT-S/2 MLP in", (4, 256, 384), 1536, "gelu_tanh", workload=True)
    yield sample("DiT-S/2 MLP out", (4, 256, 1536), 384, extras="bias residual gate", workload=True)
    yield sample("SD 1.5 GEGLU 32x32", (2, 1024, 640), 2560, "geglu", workload=True)
    yield sample("CIFAR UNet attention 16x16", (8, 256, 256), 256, extras="bias residual", workload=True)
    yield sample("emoji UNet time embedding", (36, 128), 512, "silu", workload=True)
    for name, shape, n, activation, extras in (
        ("SD 1.5 64x64 projection", (2, 4096, 320), 320, "none", "bias residual"),
        ("SD 1.5 64x64 GEGLU", (2, 4096, 320), 1280, "geglu", "bias"),
        ("SDXL 32x32 projection", (2, 1024, 1280), 1280, "none", "bias residual"),
        ("SDXL 32x32 GEGLU", (2, 1024, 1280), 5120, "geglu", "bias"),
        ("SDXL 32x32 MLP out", (2, 1024, 5120), 1280, "none", "bias residual"),
        ("DiT-XL/2 MLP in", (8, 256, 1152), 4608, "gelu_tanh", "bias"),
        ("DiT-XL/2 MLP out", (8, 256, 4608), 1152, "none", "bias residual gate"),
        ("FLUX.1 MLP in", (1, 4608, 3072), 12288, "gelu_tanh", "bias"),
    ):
        yield for_gpu(sample(name, shape, n, activation, extras))


@linear.cost
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, gate: Tensor | None
) -> Cost:
    tokens = x.numel() // max(1, x.shape[-1])
    n = weight.shape[0] // (2 if activation in GATED else 1)
    numbers = x.numel() + weight.numel() + tokens * n * (1 if residual is None else 2)
    return Cost(bytes=numbers * x.element_size(), flops=2 * tokens * weight.numel())

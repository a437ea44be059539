"""The queries, keys and values that tokens attend to one another with (Vaswani et al. 2017, section 3.2.2), as one
product: three linear layers of one input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import shaped, unfit
from diffkern.invariant import apart, rows
from diffkern.layout import accumulate, fast_dtype, joined, of_one_dtype
from diffkern.op import Backend, Cost, Sample, for_gpu, op
from diffkern.ops.linear import multiply, ours


@op
def query_key_value(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias for each of the three, side by side.

    x: [B, ..., K]. q_weight, k_weight, v_weight: [N, K]. q_bias, k_bias, v_bias: [N], or None for all. Returns
    [B, ..., 3, N] (queries, keys, values), contiguous, dtype of x."""
    acc = accumulate(x.dtype)
    layers = zip((q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias), strict=True)
    each = [F.linear(x.to(acc), w.to(acc), None if b is None else b.to(acc)) for w, b in layers]
    return torch.stack(each, -2).to(x.dtype)


def _supports(x: Tensor, *parameters: Tensor | None) -> bool | str:
    same = of_one_dtype(x, *parameters)
    return fast_dtype(x.dtype) if same is True else same


@query_key_value.checks
def _check(x: Tensor, *parameters: Tensor | None) -> list[int]:
    """The shape of the result. Raises RuntimeError with a sentence if the arguments do not fit together."""
    weights, biases = parameters[:3], parameters[3:]
    if x.dim() < 2:
        unfit("query_key_value", "x", "[B, ..., K]", x.shape)
    first = weights[0]
    assert first is not None
    if first.dim() != 2 or first.shape[1] != x.shape[-1]:
        unfit("query_key_value", "q_weight", f"[N, {x.shape[-1]}]", first.shape)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        shaped("query_key_value", f"{name}_weight", weight, *first.shape)
        shaped("query_key_value", f"{name}_bias", bias, first.shape[0])
        if (bias is None) != (biases[0] is None):
            given = f"none of {name}" if bias is None else f"one of {name}"
            unfit("query_key_value", "a bias", "given to all three or to none", given)
    return [*x.shape[:-1], 3, first.shape[0]]


@query_key_value.backend("cpu", devices=("cpu",), supports=_supports, strided=True)
def _(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    shape = _check(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias)
    if not x.numel() or not q_weight.numel():
        return compose(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias)
    weights = [q_weight, k_weight, v_weight]
    biases = _given(q_bias, k_bias, v_bias)
    bias = torch.cat(biases) if biases else None
    return multiply(x, weights, bias, "none", None, None, [*shape[:-2], 3 * shape[-1]]).view(shape)


def _given(*biases: Tensor | None) -> list[Tensor]:
    return [bias for bias in biases if bias is not None]


@query_key_value.backend("triton", devices=("cuda",), supports=_supports, strided=True)
def _(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    from diffkern.kernels.linear import linear as kernel

    if not x.numel() or not q_weight.numel():
        return compose(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias)
    biases = _given(q_bias, k_bias, v_bias)
    weight, bias = joined([q_weight, k_weight, v_weight]), joined(biases) if biases else None
    return kernel(x.contiguous(), weight, bias, "none", None, None).unflatten(-1, (3, q_weight.shape[0]))


@query_key_value.backend("torch", devices=("cpu", "cuda"), supports=of_one_dtype, strided=True)
def _(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """PyTorch's kernel in the tensors' own dtype. Joining the weights costs less than joining what they make, and
    nothing where a model has them side by side: a copy that is kept could not tell on a GPU whether a weight has
    changed."""
    biases = _given(q_bias, k_bias, v_bias)
    return (
        F.linear(x, joined([q_weight, k_weight, v_weight]), joined(biases) if biases else None)
        .unflatten(-1, (3, q_weight.shape[0]))
        .contiguous()
    )


@query_key_value.gradient
def compose(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, q_bias: Tensor | None, k_bias: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same, for autograd: it does not see through a view of three weights."""
    biases = _given(q_bias, k_bias, v_bias)
    y = F.linear(x, torch.cat([q_weight, k_weight, v_weight]), torch.cat(biases) if biases else None)
    return y.unflatten(-1, (3, q_weight.shape[0])).contiguous()


@query_key_value.batch_invariant
def _(run: Backend, x: Tensor, q_weight: Tensor, *others: Tensor | None) -> Tensor:
    parameters = (q_weight, *others)
    if run.name == "cpu" and ours(x, q_weight, "none", gated=False):
        return run(x, *parameters)
    return (rows if x.dim() == 2 else apart)(lambda x: run(x, *parameters), x)


@query_key_value.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, ...], n: int, bias: bool = True, layout: str = "contiguous", workload: bool = False
    ) -> Sample:
        def args() -> tuple[object, ...]:
            k = shape[-1]
            weights = [make((n, k), device, dtype, layout, seed=s) / max(1, k) ** 0.5 for s in (1, 2, 3)]
            biases = [make((n,), device, dtype, seed=s) if bias else None for s in (4, 5, 6)]
            return make(shape, device, dtype, layout), *weights, *biases

        return Sample(name, args, workload)

    yield sample("plain", (3, 5, 24), 16)
    yield sample("odd, no bias", (3, 7, 33), 17, bias=False)
    yield sample("strided", (2, 6, 20), 12, layout="strided")
    yield sample("rows", (5, 16), 8)
    yield sample("one element", (1, 1, 1), 1)
    yield sample("no sample", (0, 3, 8), 4)
    yield sample("no token", (2, 0, 8), 4, bias=False)
    yield sample("DiT-S/2 256x256", (4, 256, 384), 384, workload=True)
    yield sample("SD 1.5 attention 32x32", (2, 1024, 640), 640, bias=False, workload=True)
    yield for_gpu(sample("DiT-XL/2 256x256, 8 pictures", (8, 256, 1152), 1152))
    yield for_gpu(sample("SDXL attention 64x64", (2, 4096, 640), 640, bias=False))


@query_key_value.cost
def _(x: Tensor, q_weight: Tensor, *parameters: Tensor | None) -> Cost:
    tokens = x.numel() // max(1, x.shape[-1])
    numbers = x.numel() + 3 * q_weight.numel() + 3 * tokens * q_weight.shape[0]
    return Cost(bytes=numbers * x.element_size(), flops=6 * tokens * q_weight.numel())

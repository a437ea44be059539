"""RMSNorm of each head of the queries and keys (Zhang & Sennrich 2019; Dehghani et al. 2023), then the rotary embedding
of their positions (Su et al. 2021): what FLUX, SD 3.5 and their kin do in front of every attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import refuse, shaped, together, unfit
from diffkern.layout import accumulate, fast_dtype, memory_format
from diffkern.op import Cost, Sample, op


@op
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x * cos + turned(x) * sin, with x = rms_norm(q or k) over each head, and (-b, a) for each pair (a, b) in turned.

    q: [B, S, H, D]. k: [B, S, Hk, D]. q_weight, k_weight: [D], or None for no norm. cos, sin: float32 [S, D], or None
    for no rotation. The pairs are elements (0, 1), (2, 3), ... if interleaved, as in FLUX, else (0, D/2), (1, D/2 + 1),
    ..., as in Stable Audio. Returns (q, k), shapes and dtypes as given, contiguous. Raises RuntimeError for one of
    cos and sin."""

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        acc = accumulate(x.dtype)
        y = x.to(acc)
        if weight is not None:
            y = F.rms_norm(y, y.shape[-1:], weight.to(acc), eps)
        if cos is not None and sin is not None:
            a, b = y.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else y.chunk(2, dim=-1)
            turned = torch.stack([-b, a], dim=-1).flatten(-2) if interleaved else torch.cat([-b, a], dim=-1)
            y = y * cos.to(acc)[:, None] + turned * sin.to(acc)[:, None]
        return y.to(x.dtype).contiguous()

    return one(q, q_weight), one(k, k_weight)


@qk_norm_rope.checks
def _(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, eps: float,
) -> None:  # fmt: skip
    op = "qk_norm_rope"
    if q.dim() != 4:
        unfit(op, "q", "contiguous [B, S, H, D]", q.shape)
    batch, tokens, _, width = q.shape
    if k.dim() != 4 or k.shape != (batch, tokens, k.shape[2], width):
        unfit(op, "k", f"contiguous [{batch}, {tokens}, Hk, {width}] in the dtype of q", k.shape)
    together(op, cos=cos, sin=sin)
    if cos is not None and width % 2:
        refuse(op, f"D is {width}, a rotation needs pairs")
    for name, angles in (("cos", cos), ("sin", sin)):
        shaped(op, name, angles, tokens, width)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        shaped(op, name, weight, width)


def _supports(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, eps: float,
) -> bool | str:  # fmt: skip
    if memory_format(q) is torch.channels_last:
        return "takes no channels_last q: its heads do not lie together"
    if q.dtype != k.dtype or any(
        w is not None and w.dtype not in (q.dtype, torch.float32) for w in (q_weight, k_weight)
    ):
        return "takes q and k of one dtype, and weights in that or float32"
    if any(t is not None and t.dtype != torch.float32 for t in (cos, sin)):
        return "takes cos and sin in float32"
    return fast_dtype(q.dtype)


@qk_norm_rope.backend("triton", devices=("cuda",), supports=_supports)
def _(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from diffkern.kernels.qk_norm_rope import qk_norm_rope as kernel

    return kernel(q, k, q_weight, k_weight, cos, sin, interleaved, eps)


@qk_norm_rope.backend("cpu", devices=("cpu",), supports=_supports)
def _(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.ops.diffkern_C.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, interleaved, eps)


@qk_norm_rope.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, shape: tuple[int, int, int, int], k_heads: int, norm: bool, rope: bool, interleaved: bool = True,
        layout: str = "contiguous", workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            batch, tokens, _, width = shape
            q, k = make(shape, device, dtype, layout), make((batch, tokens, k_heads, width), device, dtype, seed=1)
            weights = (make((width,), device, dtype, seed=s) if norm else None for s in (2, 3))
            angle = make((tokens, width), device, accumulate(dtype), seed=4)
            angles = (angle.cos(), angle.sin()) if rope else (None, None)
            return q, k, *weights, *angles, interleaved, 1e-6

        return Sample(name, args, workload)

    for interleaved in (True, False):
        pairs = "interleaved" if interleaved else "halves"
        yield sample(f"a block, {pairs}", (2, 5, 4, 32), 4, norm=True, rope=True, interleaved=interleaved)
        yield sample(f"64 a head, {pairs}", (1, 2, 3, 64), 2, norm=True, rope=True, interleaved=interleaved)
        yield sample(f"128 a head, {pairs}", (1, 2, 2, 128), 1, norm=True, rope=True, interleaved=interleaved)
        yield sample(f"odd, {pairs}", (2, 3, 5, 22), 2, norm=True, rope=True, interleaved=interleaved)
        yield sample(f"no norm, {pairs}", (3, 4, 3, 16), 1, norm=False, rope=True, interleaved=interleaved)
        yield sample(f"one pair, {pairs}", (1, 2, 1, 2), 1, norm=True, rope=True, interleaved=interleaved)
        yield sample(f"no token, {pairs}", (2, 0, 3, 8), 3, norm=True, rope=True, interleaved=interleaved)
    yield sample("no rotation", (2, 5, 3, 40), 3, norm=True, rope=False)
    yield sample("odd width", (2, 5, 3, 7), 3, norm=True, rope=False)
    yield sample("neither", (1, 2, 3, 8), 3, norm=False, rope=False)
    yield sample("no sample", (0, 2, 3, 8), 3, norm=True, rope=True)
    yield sample("Stable Audio Open", (2, 1025, 24, 64), 12, norm=False, rope=True, interleaved=False, workload=True)
    yield sample("FLUX.1 1024x1024", (1, 4608, 24, 128), 24, norm=True, rope=True, workload=True)
    yield sample("SD 3.5 medium 1024x1024", (2, 4250, 24, 64), 24, norm=True, rope=False, workload=True)
    yield sample("strided", (2, 5, 3, 24), 2, norm=True, rope=True, layout="strided")


@qk_norm_rope.cost
def _(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    interleaved: bool, eps: float,
) -> Cost:  # fmt: skip
    angles = sum(4 * t.numel() for t in (cos, sin) if t is not None)
    return Cost(bytes=2 * (q.numel() + k.numel()) * q.element_size() + angles, flops=7 * (q.numel() + k.numel()))

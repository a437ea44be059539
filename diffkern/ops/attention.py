"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2), from the layout that projections write to the one
that they read: no transpose and no copy on either side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.check import shaped, unfit
from diffkern.invariant import masked
from diffkern.layout import accumulate, fast_dtype
from diffkern.op import Backend, Cost, Sample, for_gpu, op
from diffkern.packing import vectors


@op
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + mask) v for every head, with scale = 1 / sqrt(D) unless given.

    q: [B, S, H, D]; k, v: [B, T, H, D]; one dtype, and any strides: views into packed q, k, v are welcome. mask: bool
    (True where a query attends to a key) or floating (added), broadcastable to [B, H, S, T]. A query that attends to no
    key gets zeros. Returns [B, S, H D], contiguous."""
    acc = accumulate(q.dtype)
    query, key, value = (t.to(acc).transpose(1, 2) for t in (q, k, v))
    scores = query @ key.mT * _scale(q, scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(acc)
    weights = torch.softmax(scores, -1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
    return (weights @ value).transpose(1, 2).flatten(2).to(q.dtype).contiguous()


@attention.checks
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> None:
    if q.dim() != 4:
        unfit("attention", "q", "[B, S, H, D]", q.shape)
    if k.dim() != 4:
        unfit("attention", "k", "[B, T, H, D]", k.shape)
    batch, _, heads, width = q.shape
    for name, t in (("k", k), ("v", v)):
        shaped("attention", name, t, batch, k.shape[1], heads, width)
    _everywhere(mask, q, k)


def _scale(q: Tensor, scale: float | None) -> float:
    return max(1, q.shape[-1]) ** -0.5 if scale is None else scale


def _supports(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> bool | str:
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "takes q, k and v of one dtype"
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        return "takes a mask that is bool or has the dtype of q"
    return fast_dtype(q.dtype)


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with the numbers of a head side by side: all that kernels ask for."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _everywhere(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a view [B, H, S, T]."""
    if mask is None:
        return None
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.shape == shape:
        return mask
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    fits = mask.dim() <= 4 and all(size in (1, wanted) for size, wanted in sizes)
    if not fits:
        unfit("attention", "mask", f"broadcastable to {list(shape)}", mask.shape)
    return mask.expand(shape)


def _defers(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> str | None:
    """Measured beside PyTorch's with AVX-512, on one and two threads: in float32 the C++ kernel is 0.9 to 2.1 times as
    fast up to 256 numbers a head, most for few, but 0.7 to 1.2 times for 512, and 0.65 to 0.8 times from 160 on with
    16 queries; in bfloat16 and float16 it is 0.9 to 3 times as fast. With AVX512_BF16, on one thread in bfloat16, it is
    1.7 to 3.3 times as fast on the workloads below, and no slower with 1 to 16 queries. With AVX2 alone it is 1.0 to
    2.5 times as fast, but 0.8 to 0.9 times where the keys of a wide head leave a cache of 512 KB; not in float16, which
    PyTorch converts again and again."""
    queries, keys, dim = q.shape[1], k.shape[1], q.shape[-1]
    if vectors() == "AVX2" and q.dtype != torch.float16 and dim > 128 and keys * dim > 1 << 17:
        return f"PyTorch is faster with AVX2 alone for {keys} keys of {dim} numbers"
    if q.dtype == torch.float32 and (dim > 256 or (dim > 128 and queries <= 16)):
        return f"PyTorch is faster in float32 with {dim} numbers a head and {queries} queries"
    return None


@attention.backend("cpu", devices=("cpu",), supports=_supports, strided=True, defers=_defers)
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    return torch.ops.diffkern_C.attention(*_rows(q, k, v), _scale(q, scale), _everywhere(mask, q, k))


def _supports_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> bool | str:
    from diffkern.kernels.attention_cuts import WIDEST_OF_CUDA

    if q.dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16"
    if mask is not None:
        return "takes no mask"
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST_OF_CUDA:
        return f"takes heads of a multiple of 8 numbers, at most {WIDEST_OF_CUDA}"
    return _supports(q, k, v, scale, mask)


def _wide(t: Tensor) -> Tensor:
    """The tensor, with the numbers of a head side by side and heads that begin on 16 bytes; else a copy that is so."""
    apart = (stride for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True) if size > 1)
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and not any(stride % 8 for stride in apart):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _defers_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> str | None:
    """Until it has been timed on a GPU and a table says that it was the fastest, it is not chosen."""
    from diffkern.kernels.attention_cuts import measured

    found = measured(q, k.shape[1], mask)
    if found is None or found.cuda_block is None:
        return "it was not timed on such a GPU with such a call"
    if found.cuda_us < min(found.us, found.torch_us):
        return None
    return f"others were as fast: {min(found.us, found.torch_us):g} us where this took {found.cuda_us:g}"


@attention.backend("cuda", devices=("cuda",), supports=_supports_cuda, strided=True, defers=_defers_cuda)
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    from diffkern.kernels.attention_cuts import cuda_block

    block = cuda_block(q, k.shape[1])
    return torch.ops.diffkern_CUDA.attention(*map(_wide, (q, k, v)), _scale(q, scale), block)


def _defers_to_torch(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> str | None:
    """PyTorch has three kernels to choose from, cuDNN's first: what the table of launch shapes says of a call decides.
    What is not in it goes to PyTorch, but for two kinds that it has no fast kernel for: masked calls in 16 bits, 2.2 to
    2.6 times as long on an H200, and many tokens of 512 numbers."""
    from diffkern.kernels.attention_cuts import by_products, call_of, measured

    found = measured(q, k.shape[1], mask)
    if found is None:
        if by_products(*call_of(q, k.shape[1], mask)):
            return None
        if mask is not None and q.element_size() == 2 and q.shape[-1] <= 256:
            return None
        return "PyTorch's own runs where nothing was measured"
    if found.us < found.torch_us:
        return None
    return f"PyTorch's own was as fast: {found.torch_us:g} us where this took {found.us:g}"


@attention.backend("triton", devices=("cuda",), supports=_supports, strided=True, defers=_defers_to_torch)
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    from diffkern.kernels.attention import attention as kernel

    return kernel(*_rows(q, k, v), _scale(q, scale), _everywhere(mask, q, k))


@attention.gradient
@attention.backend("torch", devices=("cpu", "cuda"), supports=_supports, strided=True)
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """PyTorch's own: what trains, and what runs where it is faster than the kernels here."""
    if q.is_cuda and not (q.numel() and k.numel()):  # cuDNN returns no tensor
        return q.masked_fill(q.new_ones((), dtype=torch.bool), 0).flatten(2)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    if mask is not None and mask.is_cuda:  # cuDNN averages the values of keys that do not count, if none does
        hidden = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask.isneginf().all(-1, keepdim=True)
        out = out.masked_fill(hidden, 0)
    return out.transpose(1, 2).flatten(2).contiguous()  # a head that had to be padded leaves gaps


@attention.batch_invariant
def _(run: Backend, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    ours = run.name in ("cpu", "cuda") or (run.name == "triton" and q.shape[-1] <= 256)
    if ours:  # and no library's products
        return run(q, k, v, scale, mask)
    return masked(lambda q, k, v, mask: run(q, k, v, scale, mask), q, k, v, mask)


@attention.samples
def _(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    from diffkern.testing import make

    def sample(
        name: str, batch: int, queries: int, keys: int, heads: int, dim: int, packed: bool = False,
        scale: float | None = None, mask: str = "", spread: float = 1.0, workload: bool = False,
    ) -> Sample:  # fmt: skip
        def args() -> tuple[object, ...]:
            q = make((batch, queries, heads, dim), device, dtype) * spread
            k, v = (make((batch, keys, heads, dim), device, dtype, seed=s) for s in (1, 2))
            if packed and queries == keys:
                q, k, v = torch.stack((q, k, v), 2).unbind(2)
            elif packed:
                k, v = torch.stack((k, v), 2).unbind(2)
            return q, k, v, scale, masks[mask](batch, queries, keys) if mask else None

        return Sample(name, args, workload)

    def padding(batch: int, queries: int, keys: int) -> Tensor:  # every sample its own number of keys, the last none
        count = torch.arange(batch - 1, -1, -1, device=device)
        return (torch.arange(keys, device=device) < count[:, None])[:, None, None]

    masks = {
        "padding": padding,
        "text": lambda b, s, t: (torch.arange(t, device=device) < t * 3 // 4).expand(b, 1, 1, t),
        "causal": lambda b, s, t: torch.ones(s, t, device=device).tril().bool(),
        "added": lambda b, s, t: make((b, 1, s, t), device, dtype, seed=3),
        "added, some -inf": lambda b, s, t: make((b, 1, s, t), device, dtype, seed=3).clamp(min=0).log(),
    }

    yield sample("self", 2, 5, 5, 2, 8)
    yield sample("odd", 3, 7, 5, 3, 5, scale=0.3)
    yield sample("packed", 2, 20, 20, 3, 8, packed=True)
    yield sample("packed keys and values", 2, 9, 4, 2, 16, packed=True)
    yield sample("one key", 2, 6, 1, 2, 8)
    yield sample("one query", 2, 1, 19, 2, 8)
    yield sample("one number", 1, 1, 1, 1, 1)
    yield sample("no sample", 0, 4, 4, 2, 8)
    yield sample("no query", 2, 0, 4, 2, 8)
    yield sample("no key", 2, 3, 0, 2, 8)
    for dim in (32, 33, 40, 72, 80, 160):  # one tile and more; queries in all widths of vectors, keys in two blocks
        yield sample(f"{dim} a head", 1, 83, 101, 1, dim, packed=True)
    yield sample("512 a head", 1, 18, 33, 1, 512)
    yield sample("512 a head, far apart", 1, 33, 130, 1, 512, spread=10.0)  # what one sum of 512 products would lose
    if dtype.itemsize == 2:  # too many scores for an interpreter, but not for a library's products
        yield sample("512 a head, many keys", 1, 256, 4096, 1, 512)
        yield sample("264 a head, more keys than a program holds", 1, 64, 16400, 1, 264)
    # Scores up to 100: the exponential of them overflows, and what is not near the maximum is zero.
    yield sample("far apart", 2, 33, 130, 2, 16, spread=30.0)
    for mask in masks:
        yield sample(f"masked, {mask}", 1 if mask == "causal" else 2, 6, 6, 2, 8, mask=mask)
        # Full and other vectors of queries, and keys in two blocks of which the second is not full.
        yield sample(f"many, masked, {mask}", 1, 83, 101, 2, 80, mask=mask)
    for side, dim in ((16, 160), (8, 160), (32, 80), (64, 40)):
        batch = 1 if side == 64 else 2  # the reference's scores would not fit into many memories
        yield sample(f"SD 1.5 {side}x{side}", batch, side**2, side**2, 8, dim, packed=True, workload=True)
        yield sample(f"SD 1.5 {side}x{side}, text", 2, side**2, 77, 8, dim, packed=True, workload=True)
    yield sample("SDXL 32x32", 1, 1024, 1024, 20, 64, packed=True, workload=True)
    yield sample("SD 1.5 VAE 64x64", 1, 4096, 4096, 1, 512, workload=True)
    yield sample("DiT-S/2 16x16", 4, 256, 256, 6, 64, packed=True, workload=True)
    yield sample("DiT-XL/2 16x16", 2, 256, 256, 16, 72, packed=True, workload=True)
    for mask in ("text", "added"):
        yield sample(f"PixArt 32x32, text, {mask}", 2, 1024, 120, 16, 72, packed=True, mask=mask, workload=True)
    yield sample("CIFAR UNet 16x16", 8, 256, 256, 1, 256, workload=True)
    yield sample("emoji UNet 8x8", 36, 64, 64, 4, 32, workload=True)
    yield sample("emoji UNet 4x4", 36, 16, 16, 6, 32, workload=True)
    for name, batch, queries, keys, heads, dim in (
        ("SD 1.5 64x64, 2 latents", 2, 4096, 4096, 8, 40),
        ("SDXL 64x64", 2, 4096, 4096, 10, 64),
        ("SDXL 64x64, text", 2, 4096, 77, 10, 64),
        ("SDXL 32x32, 2 latents", 2, 1024, 1024, 20, 64),
        ("SDXL 32x32, text", 2, 1024, 77, 20, 64),
        ("DiT-XL/2 16x16, 8 pictures", 8, 256, 256, 16, 72),
        ("DiT-XL/2 32x32, 8 pictures", 8, 1024, 1024, 16, 72),
        ("FLUX.1 1024x1024", 1, 4608, 4608, 24, 128),
        ("SD 1.5 2048x2048, 160 a head", 2, 4096, 4096, 8, 160),
        ("SDXL 128x128, 2 heads", 1, 16384, 16384, 2, 64),
        ("CIFAR UNet 16x16, 64 pictures", 64, 256, 256, 1, 256),
        ("SDXL VAE 128x128", 1, 16384, 16384, 1, 512),
    ):
        yield for_gpu(sample(name, batch, queries, keys, heads, dim, packed=dim < 256))


@attention.cost
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Cost:
    masked = 0 if mask is None else mask.numel() * mask.element_size()
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    return Cost(bytes=2 * (q.numel() + k.numel()) * q.element_size() + masked, flops=(4 * q.shape[3] + 5) * scores)

"""Attention in CUDA on sizes that the samples of the op do not have: every width of a head, both blocks of queries,
keys that end anywhere. On a GPU if there is one, else on the CPU as test_cuda_kernels.py does it, with tensor cores and
copies that arrive late (cuda_on_cpu/matrix.h)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_cuda_kernels import DEVICE, library  # noqa: F401
from torch import Tensor

from diffkern import attention, use_backend
from diffkern.op import OPS
from diffkern.testing import check, make

pytestmark = pytest.mark.device
HALF, BFLOAT16 = torch.float16, torch.bfloat16


def packed(batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as a projection writes them: k and v are views into one tensor, and q too where there are as many."""
    if queries == keys:
        return make((batch, queries, 3, heads, dim), DEVICE, dtype).unbind(2)
    k, v = make((batch, keys, 2, heads, dim), DEVICE, dtype, seed=1).unbind(2)
    return make((batch, queries, heads, dim), DEVICE, dtype), k, v


def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    with use_backend("cuda"):
        return attention(q, k, v, scale)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("dim", [8, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 128, 136, 160])
def test_every_width_of_a_head(dim, dtype):
    check(OPS["attention"], "cuda", (*packed(1, 35, 77, 2, dim, dtype), None, None))


@pytest.mark.parametrize("dim", [40, 80], ids=["64 keys a block", "32 keys a block"])
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 128, 200, 256])
def test_keys_that_end_anywhere(keys, dim):
    """In the first block or a later one, full or not, within 16 keys that are multiplied at once or behind them."""
    check(OPS["attention"], "cuda", (*packed(1, 17, keys, 1, dim, HALF if keys % 2 else BFLOAT16), None, None))


@pytest.mark.parametrize("queries", [1, 63, 64, 65, 130])
def test_queries_that_end_anywhere(queries):
    check(OPS["attention"], "cuda", (*packed(2, queries, 40, 1, 48, BFLOAT16), None, None))


@pytest.mark.parametrize(("dim", "keys"), [(32, 65), (40, 77), (64, 130), (80, 77), (72, 100), (88, 20)])
def test_long_sequences_take_128_queries_a_block(dim, keys):
    """Up to 80 numbers a head: two tiles of 16 queries a warp, which share what is read of the keys."""
    check(OPS["attention"], "cuda", (*packed(1, 520, keys, 1, dim, BFLOAT16 if keys % 2 else HALF), None, None))


@pytest.mark.parametrize("queries", [70, 520], ids=["64 queries a block", "128 queries a block"])
def test_a_sample_alone_equals_itself_in_a_batch(queries):
    q, k, v = packed(2, queries, 40, 2, 24, BFLOAT16)
    together = run(q, k, v)
    for i in range(2):
        assert torch.equal(run(q[i : i + 1], k[i : i + 1], v[i : i + 1])[0], together[i])


@pytest.mark.parametrize(("dim", "keys"), [(40, 77), (160, 45)])
def test_one_key_with_all_the_weight_gives_its_values(dim, keys):
    """Bit for bit, whichever key it is, and whichever number of the head says so: each is read once, in its place."""
    q, k, v = (make((1, n, 1, dim), DEVICE, BFLOAT16, seed=n) for n in (20, keys, keys))
    for key in (0, 1, 7, 8, 15, 16, 31, 32, keys - 2, keys - 1):
        d = key * 7 % dim
        sharp_q, sharp_k = q.clone(), k.clone()
        sharp_q[..., d], sharp_k[..., d] = 100, -100
        sharp_k[:, key, :, d] = 100
        assert torch.equal(run(sharp_q, sharp_k, v, 1.0), v[0, key].expand(1, 20, 1, dim).flatten(2)), key


@pytest.mark.parametrize("queries", [20, 520])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale, queries):
    """Of a negative one the least product is the highest score; of zero all weigh the same."""
    check(OPS["attention"], "cuda", (*packed(1, queries, 39, 1, 80, HALF), scale, None))


def test_strides_change_nothing():
    ways = {
        "heads outside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens outside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "a slice": lambda t: F.pad(t, (8, 16, 0, 1, 2, 2))[:, 2:-2, :-1, 8:-16],
        "a slice that no wide load can read": lambda t: F.pad(t, (3, 5))[..., 3:-5],
        "numbers apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "one head for all": lambda t: t[:, :, :1].expand(-1, -1, 2, -1),
        "one sample for all": lambda t: t[:1].expand(2, -1, -1, -1),
    }
    plain = packed(2, 20, 37, 2, 40, HALF)
    for name, way in ways.items():
        assert torch.equal(run(*map(way, plain)), run(*(way(t).contiguous() for t in plain))), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_head(which, value):
    inputs = q, k, v = tuple(t.clone() for t in packed(2, 18, 70, 2, 40, BFLOAT16))
    inputs[which][1, 2, 1, 0] = value
    out, expected = run(q, k, v), attention.reference(q, k, v)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-8, equal_nan=True)  # bfloat16, and of its weights
    assert out[0].isfinite().all()
    assert out[1, :, :40].isfinite().all()


def test_what_is_left_to_others():
    backend = next(b for b in OPS["attention"].backends if b.name == "cuda")

    def why_not(dim: int, dtype: torch.dtype = HALF, mask: Tensor | None = None) -> str | bool:
        return backend.supports(*[torch.empty(1, 4, 1, dim, dtype=dtype)] * 3, None, mask)  # type: ignore[misc]

    assert why_not(160) is True
    assert why_not(168) == why_not(44) == "takes heads of a multiple of 8 numbers, at most 160"
    assert why_not(40, torch.float32) == "takes float16 and bfloat16"
    assert why_not(40, mask=torch.ones(4, 4).bool()) == "takes no mask"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"q": (1, 4, 40)}, r"q must be \[B, S, H, D\], got \[1, 4, 40\]"),
        ({"k": (1, 5, 3, 40)}, r"k must be \[1, 5, 2, 40\], got \[1, 5, 3, 40\]"),
        ({"v": (1, 6, 2, 40)}, r"v must be \[1, 5, 2, 40\], got \[1, 6, 2, 40\]"),
        ({"block": 96}, "a block is 64 queries, or 128 of heads of up to 80 numbers, got 96 of 40"),
        ({"first": 4}, "the numbers of a head of k must be neighbours, and begin on 16 bytes"),
        ({"dtype": BFLOAT16}, "v has the wrong dtype"),
    ],
)
def test_the_launcher_refuses_with_a_sentence(wrong, sentence):
    given: dict[str, Any] = {"q": (1, 4, 2, 40), "k": (1, 5, 2, 48), "v": (1, 5, 2, 40), "first": 0, "block": 64}
    given |= wrong
    q, k, v = (torch.zeros(given[x], dtype=given.get("dtype" if x == "v" else "", HALF), device=DEVICE) for x in "qkv")
    k = k[..., given["first"] : given["first"] + 40]
    with pytest.raises(RuntimeError, match=f"diffkern::attention: {sentence}"):
        torch.ops.diffkern_CUDA.attention(q, k, v, 1.0, given["block"])

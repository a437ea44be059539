"""On a GPU: every op in a CUDA graph and under torch.compile, tensors of more than 2^31 elements, the bundled model.
benchmarks/gpu_run.sh runs these beside the op tests on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import diffkern
from diffkern.backend import use_backend
from diffkern.op import OPS
from diffkern.ops.randn import noise_keys, normal
from diffkern.testing import tensors

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def calls(name: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """The first and the last small sample of an op: the most and the least that it is given."""
    small = [s for s in OPS[name].make_samples(DEVICE, dtype) if not s.workload]
    for sample in (small[0], small[-1]):
        yield OPS[name].bind(*sample.args())


@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_an_op(name):
    op = OPS[name]
    for args in calls(name, torch.float16):
        expected = [t.clone() for t in tensors(op(*args))]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            op(*args)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # raises when an op waits for the device
            got = tensors(op(*args))
        for t in got:
            t.fill_(torch.nan)
        graph.replay()
        for g, e in zip(got, expected, strict=True):
            same(g, e)


@pytest.mark.parametrize("name", OPS)
def test_inductor_takes_an_op(name):
    op = OPS[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True)
    for args in calls(name, torch.bfloat16):
        for got, expected in zip(tensors(compiled(*args)), tensors(op(*args)), strict=True):
            same(got, expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_elements_beyond_two_to_the_31(backend):
    keys, n = noise_keys(4, 1, DEVICE), (1 << 31) + 4104
    op = OPS["randn"]
    if backend not in [b.name for b in op.backends]:
        pytest.skip(f"randn has no {backend} backend")
    if (reason := next(b for b in op.backends if b.name == backend).why_not(op.bind(keys, [n]))) is not None:
        pytest.skip(reason)
    with use_backend(backend):
        tail = op(keys, [n], 0, torch.float16, 0)[:, -4104:]
    assert (tail.float() - normal(keys, [4104], 0, torch.float32, offset=n - 4104)).abs().max() < 4e-3


def test_emoji_are_those_of_a_cpu():
    """The noise is the same, and the network is one: what differs is rounding, over twenty steps."""
    table = diffkern.make_table("dpmpp_2m", diffkern.load("emoji-32").schedule, 20)
    pictures = [
        diffkern.sample(diffkern.load("emoji-32", device=device).model, table, 4, labels=[0, 1, 2, 3], guidance=2.0)
        for device in ("cpu", DEVICE)
    ]
    assert (pictures[0] - pictures[1].cpu()).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_alone_equals_itself_in_a_batch(dtype):
    emoji = diffkern.load("emoji-32", device=DEVICE, dtype=dtype)
    table = diffkern.make_table("dpmpp_2m", emoji.schedule, 4)
    with diffkern.batch_invariant():
        together = diffkern.sample(emoji.model, table, 5, labels=3, guidance=2.0)
        alone = diffkern.sample(emoji.model, table, sample_ids=[2], labels=3, guidance=2.0)
    assert torch.equal(alone[0], together[2])

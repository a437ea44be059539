"""Every op in the registry, on every backend that can run here, against its float64 oracle."""

from __future__ import annotations

import pytest
import torch
from one_sample import alone
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkern.available import availability
from diffkern.op import OPS
from diffkern.testing import check, tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def small_samples(device: str, dtype: torch.dtype):
    for op in OPS.values():
        for sample in op.make_samples(device, dtype):
            if not sample.workload:
                name = f"{op.name}-{sample.name}-{device}-{str(dtype)[6:]}"
                yield pytest.param(op, sample, id=name, marks=[pytest.mark.gpu] if device == "cuda" else [])


CALLS = [call for device in DEVICES for dtype in DTYPES for call in small_samples(device, dtype)]


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda", "torch"])
@pytest.mark.parametrize(("op", "sample"), CALLS)
def test_backend_agrees_with_the_oracle(op, sample, backend):
    if (reason := availability(backend)) is not None:
        pytest.skip(reason)
    found = next((b for b in op.backends if b.name == backend), None)
    if found is None:
        pytest.skip(f"{op.name} has no {backend} backend")
    args = op.bind(*sample.args())
    if (reason := found.why_not(args)) is not None:
        pytest.skip(reason)
    check(op, backend, args)


@pytest.mark.parametrize("device", [pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_backend_takes_nearly_every_sample(op, device):
    """So that what is skipped above is the exception, such as contiguous pictures by a kernel for channels_last."""
    calls = [[op.bind(*s.args()) for s in op.make_samples(device, d) if not s.workload] for d in DTYPES]
    for b in (b for b in op.backends if availability(b.name) is None):
        # Of the dtype of which it refuses least: a kernel may be for 16 bits only.
        refused = min(([r for args in some if (r := b.why_not(args)) is not None] for some in calls), key=len)
        if not all(reason.startswith("runs on") for reason in refused):
            assert len(refused) < 0.7 * len(calls[0]), f"{b.name}: {refused}"


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if any(b.defers for b in op.backends)], ids=lambda op: op.name
)
def test_the_batch_does_not_choose_the_backend(op):
    """Backends round in their own ways: a sample's bits would depend on how many others there are."""
    with FakeTensorMode():
        for sample in op.make_samples("cpu", torch.bfloat16):
            args = op.bind(*sample.args())
            if not len(args[0]):
                continue
            one = alone(op, args, 0)
            own = [isinstance(a, Tensor) and a is not b for a, b in zip(one, args, strict=True)]
            many = tuple(one)
            for batch in (8, 64, 512):
                many = tuple(torch.cat([a] * 8) if mine else a for a, mine in zip(many, own, strict=True))
                for b in op.backends:
                    assert b.why_defer(many) == b.why_defer(tuple(one)), f"{sample.name}, {batch}: {b.name}"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_opcheck(op):
    small = [s for s in op.make_samples("cpu", torch.float32) if not s.workload]
    for sample in (small[0], small[-1]):  # the most and the least that the op is given
        torch.library.opcheck(op.overload, op.bind(*sample.args()))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compiles_without_a_graph_break(op):
    args = next(s for s in op.make_samples("cpu", torch.float32) if not s.workload).args()
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    for got, expected in zip(tensors(compiled(*args)), tensors(op(*args)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_op_is_complete(op):
    assert "Returns" in (op.__doc__ or ""), "a docstring says what is returned"
    workloads = [s for s in op.make_samples("cpu", torch.float32) if s.workload]
    assert workloads, "an op needs a realistic workload to be timed on"
    assert op.check is not type(op).check, "an op says which sizes fit together"
    cost = op.count_cost(*workloads[0].args())
    assert cost.bytes > 0
    assert cost.flops > 0

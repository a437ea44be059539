"""A call that PyTorch's dispatcher would only pass on does without it; what it is there for still goes through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import diffkern
from diffkern.op import OPS, Op

NORM, CONV = OPS["group_norm_silu"], OPS["conv2d"]
X = torch.linspace(-2, 2, 2 * 4 * 3 * 3).view(2, 4, 3, 3)
W = torch.linspace(-1, 1, 5 * 4 * 3 * 3).view(5, 4, 3, 3)


class Below(TorchDispatchMode):
    """Sees what is called, where PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Above(TorchFunctionMode):
    """Sees what is called, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass that says which functions it went through."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        TAGS.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


TAGS: list[str] = []


@pytest.fixture(name="through")
def count_dispatched(monkeypatch):
    """How many calls of the two ops the dispatcher was given."""
    given: list[str] = []

    def count(op: Op) -> Callable[..., Any]:
        overload = op.overload

        def counted(*args: Any) -> Any:
            given.append(op.name)
            return overload(*args)

        return counted

    for op in (NORM, CONV):
        monkeypatch.setattr(op, "overload", count(op))
    return given


def call() -> Tensor:
    return diffkern.conv2d(diffkern.group_norm_silu(X, 2, eps=1e-3), W, padding=[1])


def test_a_plain_call_does_without(through):
    expected = NORM.overload(*NORM.bind(X, 2, eps=1e-3))
    through.clear()
    with torch.no_grad():
        got = diffkern.group_norm_silu(X, 2, eps=1e-3)
        diffkern.conv2d(X, nn.Parameter(W), padding=[1])
    with torch.inference_mode():
        call()
    call()  # nothing needs a gradient
    assert through == []
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", [Below, Above])
def test_modes_see_the_ops(mode, through):
    with mode() as watching:
        call()
    assert through == ["group_norm_silu", "conv2d"]
    assert [name for name in watching.seen if "diffkern" in name] == [
        "diffkern.group_norm_silu.default",
        "diffkern.conv2d.default",
    ]
    call()
    assert len(through) == 2


def test_profilers_see_the_ops():
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    assert {"diffkern::group_norm_silu", "diffkern::conv2d"} <= {event.key for event in seen.key_averages()}


def test_traces_and_transforms_see_the_ops(through):
    names = [str(node.target) for node in make_fx(lambda x: diffkern.group_norm_silu(x, 2))(X).graph.nodes]
    assert "diffkern.group_norm_silu.default" in names
    traced = torch.jit.trace(lambda x: diffkern.group_norm_silu(x, 2), (X,), check_trace=False)
    assert "diffkern::group_norm_silu" in str(traced.graph)
    through.clear()
    each = torch.vmap(lambda x: diffkern.group_norm_silu(x, 2))(torch.stack([X, 2 * X + 1]))
    assert through == ["group_norm_silu"]
    assert torch.equal(each[1], diffkern.group_norm_silu(2 * X + 1, 2))


def test_subclasses_and_tensors_without_memory_have_it(through):
    TAGS.clear()
    diffkern.group_norm_silu(X.as_subclass(Tagged), 2)
    assert "diffkern.group_norm_silu.default" in TAGS
    assert diffkern.group_norm_silu(X.to("meta"), 2).device.type == "meta"
    negative = torch._neg_view(X)
    assert negative.is_neg()
    torch.testing.assert_close(diffkern.group_norm_silu(negative, 2), diffkern.group_norm_silu(-X, 2))
    assert through == ["group_norm_silu"] * 3


def test_arguments_of_other_types_are_converted_or_refused_by_it(through):
    same = diffkern.conv2d(X, W, padding=[1])
    assert torch.equal(diffkern.conv2d(X, W, stride=torch.tensor(1), padding=(1,)), same)
    assert diffkern.group_norm_silu(X, 2, eps=1).shape == X.shape
    assert through == ["conv2d", "group_norm_silu"]
    for wrong in ({"padding": [1.5]}, {"padding": ["1"]}, {"stride": 1.0}, {"upsample": "no"}, {"bias": 3}):
        with pytest.raises(RuntimeError, match="Expected a value of type"):
            diffkern.conv2d(X, W, **wrong)
    with pytest.raises(TypeError, match="weight must be a tensor, got None"):
        diffkern.conv2d(X, None)
    with pytest.raises(TypeError, match="too many positional arguments"):
        diffkern.group_norm_silu(X, 2, *[None] * NORM.arity)


def test_compiled_and_exported_networks_keep_the_ops():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return diffkern.group_norm_silu(x, 2, eps=1e-3)

    with torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(Net(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), Net()(X), rtol=0, atol=0)
        program = torch.export.export(Net(), (X,))
    assert "diffkern.group_norm_silu.default" in str(program.graph)

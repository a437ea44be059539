"""What the tests of recorded calls of accelerated networks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import CPURecorder, counted
from torch import Tensor
from torch.utils._pytree import tree_leaves

import diffkern
from diffkern.graphs import calls

diffusers = pytest.importorskip("diffusers")

from diffusers_models import make  # noqa: E402 (after the check for diffusers)

BEFORE = calls.BEFORE["auto"]


@pytest.fixture(name="on_cpu", autouse=True)
def _on_cpu():
    with counted() as patch:
        CPURecorder.last = CPURecorder(torch.device("cpu"))
        yield patch


def both(name: str, cuda_graph: Any = "auto") -> tuple[Any, Any]:
    """Without graphs and with."""
    models = make(name), make(name)
    for model, option in zip(models, (False, cuda_graph), strict=True):
        diffkern.accelerate(model, cuda_graph=option)
    return models


def tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def same(a: Any, b: Any) -> bool:
    """Whether two results are of one kind, layout and value."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return type(a) is type(b) and all(x.stride() == y.stride() and torch.equal(x, y) for x, y in pairs)


@torch.no_grad()
def agree(plain: Any, model: Any, *args: Any, times: int = BEFORE + 1, **kwargs: Any) -> Any:
    """Call both alike, often enough to record; their results are the same. Returns the last."""
    want = plain(*args, **kwargs)
    for _ in range(times):
        got = model(*args, **kwargs)
        assert same(got, want)
    return got


def recorded(model: Any) -> int:
    """How many graphs a network has."""
    found = vars(model).get(calls.NAME)
    return 0 if found is None else sum(graph is not None for graph in found.graphs.kept.values())


def replays(model: Any) -> int:
    return vars(model)[calls.NAME].graphs.recorder.replays

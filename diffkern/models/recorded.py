"""Calls of diffkern's own networks on a CPU, recorded once a few alike were made and replayed from then on: the same
bits, without what Python does between kernels. On a GPU `diffkern.sample` records whole steps instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern.dispatch import is_for_ops, is_traced
from diffkern.graphs import kept
from diffkern.graphs.calls import NAME, Calls, are_recorded
from diffkern.graphs.looks import is_plain


def recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a network, which is given a picture first, and then a timestep if any."""

    @functools.wraps(forward)
    def call(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_plain(x) and x.is_cpu and _may_be_recorded(x):
            # A number would be taken for one that never changes.
            args, kwargs = (*map(_tensor, args[:1]), *args[1:]), {k: _tensor(v) for k, v in kwargs.items()}
            result = _calls(self)(functools.partial(forward, self), (x, *args), kwargs, x)
            if result is not NotImplemented:
                return result
        return forward(self, x, *args, **kwargs)

    return call


def _tensor(value: Any) -> Any:
    """What a forward makes of a timestep that is a number."""
    return torch.as_tensor(value) if type(value) in (int, float) else value


def _may_be_recorded(x: Tensor) -> bool:
    return (
        kept.has_graphs(x.device)
        and are_recorded()
        and not torch.is_grad_enabled()
        and not is_traced()
        and is_for_ops(x)
    )


def _calls(network: Any) -> Calls:
    """The network's own; a shallow copy of it has those of another."""
    found = vars(network).get(NAME)
    if found is None or found.graphs.of() is not network:
        found = vars(network)[NAME] = Calls(network, "auto")
    return found

"""Calls of a network, each recorded in a graph once calls like it have been made, and replayed from then on.

Calls are alike if all that a graph takes for granted of them is: the settings that choose kernels, how arguments are
nested and named, the shapes, dtypes, devices and strides of tensors, and everything else as it is. What a caller was
given stays as it is. A replay asks the device for nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from diffkern.graphs.kept import LIMIT, Graphs, settings
from diffkern.graphs.looks import OPAQUE, State, has_own_forward, is_hooked_globally, is_patched, is_plain, tensors
from diffkern.graphs.recorder import Refused, copied

NAME = OPAQUE[0]  # the attribute of a network that has its graphs
# Calls that run as they are before one like them is recorded: in them kernels are compiled and chosen, and all is made
# that is made on first use. Where a graph would take another's place a call has to come often enough to pay for it.
BEFORE = {True: 2, "auto": 3}
BEFORE_FULL = 12
_REMEMBERED = 64  # kinds of calls that are counted
# Where the classes are from whose calls do the same whenever they are given the same tensors.
PURE = ("diffusers.", "peft.", "torch.", "diffkern.", "collections", "enum")
_CONSTANT = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class _Off(threading.local):
    depth = 0


_off = _Off()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, calls of diffkern's own networks, and the steps of `sample` unless a graph is asked for, run as they are,
    as far as this thread makes them: the same bits, in more time."""
    _off.depth += 1
    try:
        yield
    finally:
        _off.depth -= 1


def are_recorded() -> bool:
    return _off.depth == 0


def _none() -> None:
    """What a copy has in place of calls."""


class Calls:
    """The graphs of a network's calls. An attribute of it, which goes with it and is in no copy of it."""

    def __init__(self, network: nn.Module, cuda_graph: bool | str) -> None:
        self.always = cuda_graph is True
        self.before = BEFORE[cuda_graph]
        self.graphs = Graphs(network, State, f"{type(network).__name__} runs", 6)
        self.graphs.always = self.always
        self.seen: OrderedDict[Hashable, int] = OrderedDict()
        self.why_not: str | None = None
        self.changes = self.rest = 0

    def __reduce__(self) -> Any:
        return _none, ()

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Any:
        """What forward(*args, **kwargs) returns, from a graph; NotImplemented if it has to be called. x: the first of
        the tensors, on the device of the network."""
        # Graphs share their memory: one call at a time has them.
        if _is_watched(x) or not self.graphs.lock.acquire(blocking=False):
            return NotImplemented
        try:
            if self._rests(x.device):
                return NotImplemented
            leaves, spec = tree_flatten((args, kwargs))
            reason = self.why_not or _why_not_given(leaves, x.device)
            if reason is not None:
                if self.always:
                    self.graphs.warn(reason, 6)
                return NotImplemented
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if torch.is_grad_enabled() and any(t.requires_grad for t in given):
                return NotImplemented
            key = (spec, *map(_described, leaves), settings())
            graph = self.graphs.find(key)
            with self.graphs.recorder.in_order():
                if graph is not None and graph.hold():
                    return graph.replay(given)
                if self.graphs.is_refused(key) or not self._is_due(key):
                    return NotImplemented
                with torch.inference_mode(False):  # what is made here is written later, in whatever mode
                    run, own = _fixed(forward, leaves, spec)
                graph = self.graphs.record(run, own, draws=False)
                self.graphs.keep(key, graph and graph._replace(made=None))
                return NotImplemented if graph is None else graph.made
        finally:
            self.graphs.lock.release()

    def _rests(self, device: torch.device) -> bool:
        """Look at the network, unless it has changed in each of the last calls: to take it down again and again would
        only take time, and is not needed where there are no graphs."""
        if self.rest:
            self.rest -= 1
            return True
        if self.graphs.look(device):
            self.changes = 0
            return False
        assert self.graphs.looks is not None
        self.seen.clear()
        self.why_not = why_not(self.graphs.network, self.always, self.graphs.looks)
        self.changes += 1
        if self.changes > 2:
            self.rest = 1 << min(self.changes, 5)
        return False

    def _is_due(self, key: Hashable) -> bool:
        """Whether a call has come often enough to be recorded; counts it."""
        count = self.seen.pop(key, 0) + 1
        before = self.before if len(self.graphs.kept) < LIMIT else BEFORE_FULL
        if count > before:
            return True
        self.seen[key] = count
        while len(self.seen) > _REMEMBERED:
            self.seen.popitem(last=False)
        return False


@torch.no_grad()
def _fixed(forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> tuple[Callable[[], Any], list[Tensor]]:
    """A call with copies of its tensors, and these."""
    own = [copied(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    given = [leaf for leaf in own if isinstance(leaf, Tensor)]
    args, kwargs = tree_unflatten(own, spec)
    before = [t._version for t in given]

    def run() -> Any:
        with torch.inference_mode(False), torch.no_grad():
            made = forward(*args, **kwargs)
        if [t._version for t in given] != before:
            raise Refused("it writes into what it is given")
        for leaf in tree_leaves(made):
            if not isinstance(leaf, _CONSTANT) and not _is_dense(leaf):
                raise Refused(f"it returns a {type(leaf).__name__}")
        return made

    return run, given


def why_not(network: nn.Module, always: bool, state: State) -> str | None:
    """Why a network's calls are not recorded, whatever it is given, or None. always: also if nothing is known of
    classes that it has. state: of the network."""
    patched = next((m for m in network.modules() if m is not network and is_patched(m)), None)
    if patched is not None or has_own_forward(network):
        name = type(network if patched is None else patched).__name__
        return f"a {name} of it has a hook, or a forward of its own"
    if any(m._compiled_call_impl or type(m).__module__.startswith("torch._dynamo") for m in network.modules()):
        return "a part of it is compiled"
    if not all(is_plain(t) for t in tensors(network)):
        return "some of its weights are not plain tensors"
    parts = (network, *state.modules, *state.objects)
    unknown = next((part for part in parts if not type(part).__module__.startswith(PURE)), None)
    if always or unknown is None:
        return None
    return f"{type(unknown).__name__} may do something else in each call; cuda_graph=True takes it that it does not"


def _why_not_given(leaves: list[Any], device: torch.device) -> str | None:
    """Why a call with such arguments is not recorded, or None."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if not _is_dense(leaf):
                return f"it is given a {type(leaf).__name__} that is not a plain, dense tensor"
            if leaf.device != device:
                return f"it is given a tensor on {leaf.device}, and is on {device}"
        elif not isinstance(leaf, _CONSTANT):
            return f"it is given a {type(leaf).__name__}"
    return None


def _is_dense(t: Any) -> bool:
    return isinstance(t, Tensor) and is_plain(t) and t.layout is torch.strided


def _is_watched(x: Tensor) -> bool:
    """Whether something else looks at what is run: a recording of another graph, or a mode or hook that must see every
    op or module."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or is_hooked_globally()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.device, leaf.shape, leaf.stride()
    return type(leaf), leaf.hex() if type(leaf) is float else leaf  # 0.0 is not -0.0, and NaN is NaN

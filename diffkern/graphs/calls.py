"""Calls of a network, each recorded in a CUDA graph once calls like it have been made, and replayed from then on.

Calls are alike if all that a graph takes for granted of them is: the settings that choose kernels, how arguments are
nested and named, the shapes, dtypes, devices and strides of tensors, and everything else as it is. Tensors are copied
into those that the graph reads, and out of those that it writes: what a caller was given stays. A replay asks the
device for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from diffkern.graphs.kept import LIMIT, Graphs, settings
from diffkern.graphs.looks import OPAQUE, State, has_own_forward, is_hooked_globally, is_patched, is_plain, tensors
from diffkern.graphs.recorder import Refused

NAME = OPAQUE[0]  # the attribute of a network that has its graphs
# Calls that run as they are before one like them is recorded: in them kernels are compiled and chosen, and all is made
# that is made on first use. Where a graph would take another's place a call has to come often enough to pay for it.
BEFORE = {True: 2, "auto": 3}
BEFORE_FULL = 12
_REMEMBERED = 64  # kinds of calls that are counted
# Where the classes are from whose calls do the same whenever they are given the same tensors.
PURE = ("diffusers.", "peft.", "torch.", "diffkern.", "collections", "enum")
_CONSTANT = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class Calls:
    """The graphs of a network's calls. An attribute of it, which goes with it and is in no copy of it."""

    def __init__(self, network: nn.Module, cuda_graph: bool | str) -> None:
        self.always = cuda_graph is True
        self.before = BEFORE[cuda_graph]
        self.graphs = Graphs(network, State, f"{type(network).__name__} runs", 6)
        self.seen: OrderedDict[Hashable, int] = OrderedDict()
        self.why_not: str | None = None
        self.changes = self.rest = 0

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
            if graph is None and self._is_due(key):
                graph = self.graphs.record(key, lambda: _record(self.graphs, forward, leaves, spec))
            return NotImplemented if graph is None else graph(given, self.graphs.recorder)
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


class _Call(NamedTuple):
    given: list[Tensor]  # what the graph reads of a call's arguments
    replay: Callable[[], None]
    made: list[Any]
    spec: TreeSpec
    read: list[Tensor]  # what else it reads, which has to stay

    def __call__(self, given: list[Tensor], recorder: Any) -> Any:
        with recorder.in_order():
            for own, t in zip(self.given, given, strict=True):
                _written(own).copy_(_written(t))
            self.replay()
            return tree_unflatten([_copy(t) if isinstance(t, Tensor) else t for t in self.made], self.spec)


def _record(graphs: Graphs[State], forward: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> _Call:
    with torch.inference_mode(False), torch.no_grad():  # what is made here is written later, in whatever mode
        own = [_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        given = [leaf for leaf in own if isinstance(leaf, Tensor)]
        watch = graphs.watch(given, random=False)
        args, kwargs = tree_unflatten(own, spec)

        def once() -> Any:
            with torch.inference_mode(False), torch.no_grad(), watch:
                return forward(*args, **kwargs)

        before = [t._version for t in given]
        recording = graphs.recorder.record(once)
        if [t._version for t in given] != before:
            raise Refused("it writes into what it is given")
        made, of = tree_flatten(recording.made)
        for leaf in made:
            if not isinstance(leaf, _CONSTANT) and not _is_dense(leaf):
                raise Refused(f"it returns a {type(leaf).__name__}")
    return _Call(given, recording.replay, made, of, list(watch.read.values()))


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
    unknown = next((m for m in (*state.modules, *state.objects) if not type(m).__module__.startswith(PURE)), None)
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


def _copy(t: Tensor) -> Tensor:
    """A copy of the same strides."""
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    _written(made).copy_(_written(t))
    return made


def _written(t: Tensor) -> Tensor:
    """The part of a tensor to write for all of it to be written: one entry of a dimension that repeats it."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t

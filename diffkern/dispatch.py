"""PyTorch's dispatcher, and which calls of an op can do without it: to a small kernel that is a third of its time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from operator import contains
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_TYPES: dict[str, set[type]] = {
    "Tensor": {Tensor, nn.Parameter},
    "None": {NoneType},
    "int": {int},
    "float": {float},
    "bool": {bool},
    "str": {str},
    "torch.dtype": {torch.dtype},
    "list[int]": {list},
    "Sequence[int]": {list},
}
_INTEGERS = frozenset({int})
_DEVICES = {
    (False, False): frozenset[str](),
    (True, False): frozenset({"cpu"}),
    (False, True): frozenset({"cuda"}),
    (True, True): frozenset({"cpu", "cuda"}),
}
# By their names: each is asked in every call.
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _trace = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_is_profiled = torch.autograd._profiler_enabled
_is_any_autocast, _level = torch._C._is_any_autocast_enabled, torch._C._functorch.maybe_current_level


def is_traced() -> bool:
    """Whether somebody compiles, traces or transforms what is called now, or sees it below PyTorch's dispatcher: then
    tensors may be others than they look."""
    return (
        torch.compiler.is_dynamo_compiling()
        or (_modes() > 0 and not _are_silent(_get_current_dispatch_mode_stack()))
        or _transform() is not None
        or _trace() is not None
    )


def _are_silent(modes: Iterable[Any]) -> bool:
    """Whether nothing looks on but a recording of a CPU's kernels (diffkern/graphs/tape.py), which is to have those
    that run when nobody does."""
    return all(getattr(mode, "is_silent", False) for mode in modes)


def is_for_ops(x: Tensor) -> bool:
    """Whether a call with x may run in ops: not under autocast, which picks dtypes by PyTorch's functions, nor where it
    is traced for another program or by torch.func and forward-mode derivatives, which would not see through an op.
    An export is asked for by its flag: of `is_exporting()` torch 2.11 thinks that it is true of all it compiles."""
    return (
        (x.is_cpu or x.is_cuda)
        and not (_is_any_autocast() and torch.is_autocast_enabled(x.device.type))
        and _trace() is None
        and not torch.compiler._is_exporting_flag
        and _level() is None
        and forward_ad._current_level < 0
    )


class Plain:
    """Knows the calls of an op in which the dispatcher would do nothing but to call it."""

    def __init__(self, parameters: Iterable[inspect.Parameter]) -> None:
        names = [p.annotation.split(" | ") for p in parameters]
        self.types = [frozenset().union(*(_TYPES[name] for name in several)) for several in names]
        self.known: dict[tuple[type, ...], tuple[list[int], list[int]]] = {}

    def devices(self, args: tuple[Any, ...]) -> frozenset[str] | None:
        """The devices of the tensors of such a call: nobody traces, transforms, watches or profiles it, each argument
        has the very type that it is to have, and the tensors are real ones on a CPU or a GPU. None for another. Whether
        an argument needs a gradient is the caller's to ask."""
        if is_traced() or _is_profiled() or (_function_modes() and not _are_silent(_get_current_function_mode_stack())):
            return None
        types = tuple(map(type, args))
        places = self.known.get(types) or self._places(types)
        if places is None:
            return None
        tensors, lists = places
        for i in lists:
            if not _INTEGERS.issuperset(map(type, args[i])):
                return None
        cpu = cuda = False
        for i in tensors:
            t = args[i]
            if t.is_cpu:
                cpu = True
            elif t.is_cuda:
                cuda = True
            else:
                return None
            if t.is_neg():  # what its memory holds is still to be negated
                return None
        return _DEVICES[cpu, cuda]

    def _places(self, types: tuple[type, ...]) -> tuple[list[int], list[int]] | None:
        """Where the tensors and the lists are among arguments of these types, or None if they are to have others.
        Asked for once: a network calls an op with few combinations."""
        if not all(map(contains, self.types, types)):
            return None
        tensors = [i for i, t in enumerate(types) if t in _TYPES["Tensor"]]
        self.known[types] = tensors, [i for i, t in enumerate(types) if t is list]
        return self.known[types]

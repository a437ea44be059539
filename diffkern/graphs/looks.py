"""What a recorded graph takes for granted of a network, and whether it still holds."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device)
_WEIGHTS = ("_parameters", "_buffers")
# Attributes that hold a network's own graphs, and the notes of diffusers about hooks, which are seen where they hook.
OPAQUE = ("_graphs", "_diffusers_hook")


class Places:
    """Which modules there are, and where their tensors lie. Holds on to nothing of the network."""

    def __init__(self, network: nn.Module) -> None:
        self.found = list(_places(network))

    def hold(self, network: nn.Module) -> bool:
        """Whether all is as it was."""
        return self.found == list(_places(network))


class State:
    """All that a call of a network may read of it: its modules, where their tensors lie, and every attribute of them
    and of the objects that they have, such as the scale of a LoRA layer. Holds on to the network's parts and objects,
    so that it belongs where it goes with the network, and neither to weights nor to the network itself. Compared in C
    where it can be: a replay of SD 1.5's UNet looks at 709 modules first."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = list(network.modules())[1:]
        self.types = [*map(type, self.modules), type(network)]
        self.objects: list[Any] = []
        self.attributes: list[Tensor] = []  # that are neither parameters nor buffers
        self.own = _copied_state(_own(network))
        self.before = [(vars(module), _copied_state(vars(module))) for module in self.modules]
        states, seen = [self.own, *(state for state, _ in self.before)], set[int]()
        for state in states:
            for name, value in list(state.items()):
                if name not in (*_WEIGHTS, "_modules", *OPAQUE):
                    self._go_into(value, seen)
        self.weights = [state[name] for state in states for name in _WEIGHTS if name in state]
        self.places = self._places()

    def _go_into(self, value: Any, seen: set[int]) -> None:
        """Remember the attributes of objects within a value."""
        if isinstance(value, (*_SIMPLE, nn.Module)) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            self.attributes.append(value)
        elif isinstance(value, dict):
            for entry in value.values():
                self._go_into(entry, seen)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for entry in value:
                self._go_into(entry, seen)
        elif _is_object(value):
            self.objects.append(value)
            self.before.append((vars(value), _copied(vars(value))))
            self._go_into(vars(value), seen)

    def _places(self) -> list[Hashable]:
        weights = [place(t) for tensors in self.weights for t in tensors.values() if t is not None]
        return [*weights, *map(place, self.attributes)]

    def hold(self, network: nn.Module) -> bool:
        """Whether all is as it was."""
        try:
            return (
                [*map(type, self.modules), type(network)] == self.types
                and _own(network) == self.own
                and all(now == then for now, then in self.before)
                and self._places() == self.places
            )
        except Exception:  # an attribute is another, and what it is has no single truth, as an array
            return False


def _own(network: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(network).items() if name not in OPAQUE}


def _copied_state(state: dict[str, Any]) -> dict[str, Any]:
    """The dicts of weights are held as they are, and looked into for places."""
    return {name: value if name in _WEIGHTS else _copied(value) for name, value in state.items()}


def _is_object(value: Any) -> bool:
    """Whether it is one that may be told something by its attributes, such as an attention processor."""
    return hasattr(value, "__dict__") and type(value).__module__ not in ("builtins", "functools", "torch._C")


def _copied(value: Any) -> Any:
    """A value in containers of its own: equal for as long as nothing in them is changed."""
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return set(value) if isinstance(value, set) else value


def _places(network: nn.Module) -> Iterator[Hashable]:
    for module in network.modules():
        yield type(module), module.training, is_patched(module)
        yield from map(place, tensors(module, recurse=False))


def place(t: Tensor) -> Hashable:
    """Where a tensor lies and how; of another class, whether it is the same and was not changed."""
    return (t.data_ptr(), t.dtype, t.shape, t.stride()) if is_plain(t) else (id(t), t._version)


def is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter)


def is_patched(module: nn.Module) -> bool:
    """Whether a call of a module does more, or other things, than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or has_own_forward(module))


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward of its own, as of an offload hook, hides that of its class."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_hooked_globally() -> bool:
    """Whether hooks are called around the forward of every module there is."""
    return bool(globally._global_forward_hooks or globally._global_forward_pre_hooks)


def tensors(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def is_pure(network: nn.Module, known: tuple[str, ...]) -> bool:
    """Whether the network surely does the same whenever it is given the same tensors: all is of classes from these
    packages, and nothing is patched."""
    modules = network.modules()
    return all(type(m).__module__.startswith(known) and not is_patched(m) for m in modules) and all(
        is_plain(t) for t in tensors(network)
    )

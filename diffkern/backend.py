"""The backends of an op: what each can run on, and which one is forced."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffkern.available import availability, triton_interpreted
from diffkern.layout import dense

BACKENDS = ("cpu", "triton", "cuda", "torch", "reference")

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("diffkern_backend", default=None)


class BackendError(RuntimeError):
    """A backend was forced and cannot run. The message says why and what can."""


@dataclass(frozen=True)
class Backend:
    name: str
    run: Callable[..., Any]
    devices: tuple[str, ...] = ()
    supports: Callable[..., bool | str] | None = None
    strided: bool = False
    defers: Callable[..., str | None] | None = None

    @functools.cached_property
    def on(self) -> frozenset[str]:
        """The devices, to be compared with those of a call."""
        return frozenset(self.devices)

    def __call__(self, *args: Any) -> Any:
        """Run it, on dense tensors if it does not read strides itself."""
        return self.run(*(args if self.strided else dense(args)))

    def why_not(self, args: tuple[Any, ...]) -> str | None:
        """The reason that this backend cannot run on `args`, or None when it can."""
        if not self.devices:  # the reference runs everywhere
            return None
        for found in devices_of(args):
            if found not in self.devices and not (found == "cpu" and self.is_interpreted()):
                return f"runs on {' or '.join(self.devices)} tensors, not on {found}"
        return self.cannot(args)

    def cannot(self, args: tuple[Any, ...]) -> str | None:
        """The same of arguments on the right device."""
        if (unavailable := availability(self.name)) is not None:
            return unavailable
        answer = True if self.supports is None else self.supports(*args)
        return None if answer is True else (answer or "does not support these arguments")

    def why_defer(self, args: tuple[Any, ...]) -> str | None:
        """The reason that a later backend is better for `args`, which this one could take, or None."""
        return None if self.defers is None else self.defers(*args)

    def is_interpreted(self) -> bool:
        """Whether this is Triton in its interpreter, which runs the GPU kernels on CPU tensors: how a machine without
        a GPU tests them, and nothing to choose for speed."""
        return self.name == "triton" and triton_interpreted()


def devices_of(args: tuple[Any, ...]) -> set[str]:
    """The types of the devices that tensors among the arguments are on."""
    found = set()
    for a in args:
        if isinstance(a, Tensor):  # of the two common ones the name is not made anew
            found.add("cuda" if a.is_cuda else "cpu" if a.is_cpu else a.device.type)
    return found


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or DIFFKERN_BACKEND, or None for the automatic choice."""
    name = _forced.get() or os.environ.get("DIFFKERN_BACKEND") or "auto"
    if name == "auto":
        return None
    _check_name(name)
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block to one backend ("cpu", "triton", "cuda", "reference"), or "auto" for the
    automatic choice. A forced backend that cannot run raises BackendError. Raises ValueError for another name."""
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _check_name(name: str) -> None:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"no backend is named {name!r}: choose one of auto, {', '.join(BACKENDS)}")

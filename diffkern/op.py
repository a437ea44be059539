"""The only registry. An op is its reference: the shortest true PyTorch function is the meaning, the fallback, the test
oracle (run in float64) and the fake kernel; fast backends stand behind it and never change what is computed.

    @op
    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor: ...

    @modulate.backend("triton", devices=("cuda",), supports=...)
    def _(x, shift, scale): ...

Every op is `torch.ops.diffkern.<name>`: opaque to torch.compile, with the reference as its fake kernel.
"""

from __future__ import annotations

import inspect
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import invariant, native
from diffkern.backend import BACKENDS, Backend, BackendError, devices_of, forced_backend
from diffkern.dispatch import Plain

OPS: dict[str, Op] = {}

_LIBRARY = torch.library.Library("diffkern", "DEF")


class Sample(NamedTuple):
    """One call of an op. `name` says which edge or model the shape comes from; `args` makes the arguments. Small ones
    test the backends; a workload is a realistic size from a named model, for the benchmarks: True, or "cuda" if only a
    GPU is timed on it."""

    name: str
    args: Callable[[], tuple[Any, ...]]
    workload: bool | str = False


def for_gpu(sample: Sample) -> Sample:
    """A workload that a CPU would take too long for."""
    return sample._replace(workload="cuda")


class Cost(NamedTuple):
    """What a perfect kernel must do: bytes read and written once, and floating-point operations."""

    bytes: int
    flops: int


def _no_samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    return iter(())


def _no_check(*args: Any) -> None:
    """What the arguments are is left to PyTorch."""


def _no_cost(*args: Any) -> Cost:
    raise NotImplementedError("this op has no cost yet")


@dataclass(eq=False)
class Op:
    """An op: callable, with its backends in order of preference. Made by `@op`, kept in `OPS`."""

    reference: Callable[..., Any]
    backends: list[Backend] = field(default_factory=list)
    check: Callable[..., Any] = _no_check
    grad: Callable[..., Any] | None = None
    invariantly: Callable[..., Any] | None = None
    make_samples: Callable[[str, torch.dtype], Iterator[Sample]] = _no_samples
    count_cost: Callable[..., Cost] = _no_cost

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        self.fallback = Backend("reference", self.reference, strided=True)
        self.__doc__ = self.reference.__doc__
        self.signature = inspect.signature(self.reference)
        parameters = self.signature.parameters
        self.positions = {name: i for i, name in enumerate(parameters)}
        self.arity, self.plain = len(parameters), Plain(parameters.values())
        self.required = [i for i, p in enumerate(parameters.values()) if p.annotation == "Tensor"]
        # Binds arguments as Python does for a function, in as little time.
        defaults = [p.default for p in parameters.values() if p.default is not p.empty]
        self._arguments = namedtuple(self.name, parameters, defaults=defaults)  # type: ignore[misc]
        # Defaults are filled in by __call__: the dispatcher would drop trailing arguments that equal theirs.
        schema = re.sub(r"=[^,)]+", "", torch.library.infer_schema(self.reference, mutates_args=()))
        _LIBRARY.define(self.name + schema)
        _LIBRARY.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffkern::{self.name}", self._fake, lib=_LIBRARY)
        self.overload = getattr(torch.ops.diffkern, self.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self.arity:
            args = self.bind(*args, **kwargs)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self.check(*args)
            # Without a gradient of its own an op trains through its reference, which is differentiable and right.
            # Asked for None: whether a function is true, torch 2.11 cannot trace.
            return (self.reference if self.grad is None else self.grad)(*args)
        devices = self.plain.devices(args)
        return self.overload(*args) if devices is None else self._run(args, devices)

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(b.name for b in self.all_backends())}>"

    def bind(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The full positional arguments of a call, defaults filled in. Raises TypeError as a Python function does."""
        try:
            return self._arguments(*args, **kwargs)
        except TypeError:
            self.signature.bind(*args, **kwargs)  # ten times slower, but it knows what to say
            raise

    def backend(
        self,
        name: str,
        *,
        devices: tuple[str, ...],
        supports: Callable[..., bool | str] | None = None,
        strided: bool = False,
        defers: Callable[..., str | None] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the next backend in order of preference. `supports(*args)` is True or the reason why not; it says
        *can* (dtype, layout, capability), never *want*. Where the best order depends on the call, `defers(*args)` is
        the reason, as measured, to leave a call to a later backend, or None; a forced one is not asked. A backend is
        given dense tensors in the layout of the first one, or with `strided` the tensors as they are: what knows a
        weight by its identity must not get a dense copy."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            assert name in BACKENDS, f"{name} is not one of {BACKENDS}"
            self.backends.append(Backend(name, run, devices, supports, strided, defers))
            return run

        return register

    def checks(self, check: Callable[..., Any]) -> Callable[..., Any]:
        """Register what is asked of a call before anything runs, but for the kernels in C++, which ask the same
        themselves in less time: check(*args) raises RuntimeError with a sentence (diffkern/check.py) for sizes that do
        not fit together and for what else a backend must be able to trust. A kernel may read past the end of a tensor
        whose size nobody has asked for."""
        self.check = check
        return check

    def gradient(self, function: Any) -> Any:
        """Register what trains: an autograd.Function that takes the op's arguments, or a function that autograd can go
        through; run in place of the backends when an argument needs a gradient."""
        self.grad = getattr(function, "apply", function)
        return function

    def batch_invariant(self, run: Callable[..., Any]) -> None:
        """Register how a backend that promises no batch invariance is made to have it: run(backend, *args)."""
        self.invariantly = run

    def samples(self, make: Callable[[str, torch.dtype], Iterator[Sample]]) -> None:
        """Register the sample calls: a generator of `Sample` for a device and a dtype."""
        self.make_samples = make

    def cost(self, count: Callable[..., Cost]) -> None:
        """Register what a perfect kernel must do for a call: called with the op's arguments, returns a `Cost`."""
        self.count_cost = count

    def all_backends(self) -> list[Backend]:
        """The backends in order of preference. Interpreted Triton proves kernels, slowly: it comes last."""
        return sorted([*self.backends, self.fallback], key=Backend.is_interpreted)

    def choose(self, args: tuple[Any, ...], devices: Set[str] | None = None) -> Backend:
        """The backend that a call with these arguments takes now. devices: those of the tensors among them, if they are
        known. Raises BackendError if a forced one cannot."""
        if (forced := forced_backend()) is not None:
            return self._forced(forced, args)
        devices = devices_of(args) if devices is None else devices
        for b in self.backends:  # the devices first: they rule out most
            if not devices <= b.on or b.cannot(args) is not None or b.is_interpreted():
                continue
            if b.defers is None or b.defers(*args) is None:
                return b
        return self.fallback

    def _forced(self, name: str, args: tuple[Any, ...]) -> Backend:
        for b in (*self.backends, self.fallback):
            if b.name == name:
                if (reason := b.why_not(args)) is not None:
                    raise BackendError(f"{self.name}: backend {name!r} was forced but {reason}")
                return b
        have = ", ".join(b.name for b in self.all_backends())
        raise BackendError(f"{self.name}: backend {name!r} was forced but this op has only: {have}")

    def _fake(self, *args: Any) -> Any:
        """The reference, asked for shapes only. Beside a meta tensor PyTorch takes a real one for a meta one, and makes
        tensors of memory that nobody has written to."""
        devices = {a.device.type for a in args if isinstance(a, Tensor)}
        if "meta" in devices and len(devices) > 1:
            raise ValueError(f"{self.name}: the tensors must be on one device, got {' and '.join(sorted(devices))}")
        return self.reference(*args)

    def _dispatch(self, *args: Any) -> Any:
        """What PyTorch's dispatcher calls."""
        for i in self.required:  # a schema takes None for any tensor
            if args[i] is None:
                raise TypeError(f"{self.name}: {list(self.positions)[i]} must be a tensor, got None")
        return self._run(args)

    def _run(self, args: tuple[Any, ...], devices: Set[str] | None = None) -> Any:
        chosen = self.choose(args, devices)
        if chosen.name not in native.LIBRARIES:
            self.check(*args)
        if self.invariantly is not None and invariant.is_on():
            return self.invariantly(chosen, *args)
        return chosen(*args)


def op(reference: Callable[..., Any]) -> Op:
    """Make the decorated reference an op."""
    name = reference.__name__
    if name in OPS:
        raise ValueError(f"there is an op named {name!r} already")
    OPS[name] = Op(reference)
    return OPS[name]

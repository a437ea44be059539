"""Launching a kernel again without asking Triton again what to launch.

Triton works out at every launch which of a kernel's compiled forms the arguments ask for, which takes longer than many
kernels run. Here that is asked once for calls that are alike: the same whole numbers and compile-time values, and
tensors of the same dtypes that begin as far behind 16 bytes. That is finer than what Triton tells forms apart by, so
that the one that is found is the one that Triton would take; tests/test_launch.py compares the two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_MOST = 4096  # calls that a kernel remembers


def remembered(kernel: Any) -> Any:
    """The kernel, which is launched as ever, `kernel[grid](*args, **constexprs)`; in the interpreter as it is."""
    return Remembered(kernel) if isinstance(kernel, JITFunction) else kernel


class Remembered:
    """A kernel that knows the compiled forms that its launches took."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        # Numbers that are only told apart by their width.
        self.free = [p.num for p in kernel.params if p.do_not_specialize and not p.is_constexpr]
        self.found: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **more: Any) -> None:
        facts = [
            a
            if a is None or a.__class__ is int
            else (a.dtype, a.data_ptr() % 16)
            if isinstance(a, Tensor)
            else _kind(a)
            for a in args
        ]
        for i in self.free:
            facts[i] >>= 31
        device = driver.active.get_current_device()
        # A compiled kernel belongs to a device. The two switches are those of Triton that a process may turn.
        key = (
            device,
            knobs.runtime.debug,
            knobs.compilation.instrumentation_mode,
            *facts,
            *more.items(),
        )
        try:
            compiled, rest = self.found[key]
        except KeyError:
            if self.kernel.hash is None:
                _hash(self.kernel)
            compiled = self.kernel[grid](*args, **more)
            if isinstance(compiled, CompiledKernel):  # what it is not where a hook of Triton's took the launch
                if len(self.found) >= _MOST:
                    self.found.clear()
                self.found[key] = compiled, self._behind(args, more)
        else:
            grid = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            compiled[grid](*args, *rest, stream=driver.active.get_current_stream(device))

    def _behind(self, args: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, ...]:
        """The kernel's parameters behind `args`, in their order: those of `more` that are no options of the launch."""
        names = self.kernel.arg_names
        bound = self.kernel.signature.bind(*args, **{name: more[name] for name in names if name in more})
        bound.apply_defaults()
        return tuple(bound.arguments.values())[len(args) :]


def _hash(function: JITFunction) -> None:
    """Have Triton hash a function after those that it calls. By itself it leaves the constants of one that was not
    hashed before out of the key of who calls it: a kernel would have another key, and be compiled anew, in a process
    that launched others first (Triton 3.6; 3.9 does so itself)."""
    for name in function.fn.__code__.co_names:
        called = function.fn.__globals__.get(name)
        if isinstance(called, JITFunction) and called.hash is None:
            _hash(called)
    function.cache_key  # noqa: B018 (it is kept)


def _kind(a: Any) -> Any:
    """What is told apart of the rest: of a float nothing, of a descriptor all but where it points."""
    if isinstance(a, TensorDescriptor):
        return a.base.dtype, *a.block_shape, a.padding
    return float if isinstance(a, float) else (type(a), a)

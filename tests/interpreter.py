"""Triton's interpreter, made right for the 16- and 8-bit floats that it keeps as raw bits.

It truncates where a GPU rounds, and does arithmetic on the bit patterns themselves. Here casts go through torch, and
every other operation on such a type raises: kernels compute in float32, and this is the lint that says so. Seen in
Triton 3.6 and 3.9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

RAW = {tl.bfloat16: torch.bfloat16, tl.float8e5: torch.float8_e5m2, tl.float8e4nv: torch.float8_e4m3fn}
_TORCH = {**RAW, tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}
_RAW_NAMES = frozenset(dtype.name for dtype in RAW)


class RawArithmeticError(TypeError):
    """Arithmetic on a type that the interpreter only knows as bits."""


def _raw(value: Any) -> bool:
    return isinstance(value, (TensorHandle, tl.tensor)) and value.dtype.scalar.name in _RAW_NAMES


def _cast(handle: TensorHandle, dtype: tl.dtype) -> TensorHandle:
    source = torch.from_numpy(np.ascontiguousarray(handle.data))
    source = source.view(_TORCH[handle.dtype.scalar]) if _raw(handle) else source
    wide = source.to(torch.float32) if dtype in RAW else source
    result = wide.to(_TORCH[dtype]) if dtype in _TORCH else wide.to(torch.float32)
    bits = result.view(torch.uint8 if result.itemsize == 1 else torch.uint16) if dtype in RAW else result
    data = bits.numpy().reshape(handle.data.shape)
    return TensorHandle(data if dtype in _TORCH else data.astype(interpreter._get_np_dtype(dtype)), dtype)


def install() -> None:
    """Patch the interpreter of this process."""
    _install_casts()
    _install_lint()
    _install_loop_bounds()
    _install_single_patching()
    _install_memory()


def _install_casts() -> None:
    builder: Any = InterpreterBuilder
    plain_cast = builder.cast_impl

    def cast(self: Any, handle: TensorHandle, dtype: tl.dtype, *_: Any) -> TensorHandle:
        raw = _raw(handle) or dtype.scalar in RAW
        return _cast(handle, dtype.scalar) if raw else plain_cast(self, handle, dtype)

    builder.cast_impl = cast
    builder.create_fp_to_fp = cast
    plain_dot = builder.create_dot

    def dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return plain_dot(self, *(_cast(h, tl.float32) if _raw(h) else h for h in (a, b)), *rest)

    builder.create_dot = dot


def _install_lint() -> None:
    builder: Any = InterpreterBuilder

    def guarded(name: str, plain: Any) -> Any:
        def run(self: Any, *args: Any) -> Any:
            # np.where is a select: it moves bits and does no arithmetic on them.
            if any(map(_raw, args)) and args[-1] is not np.where:
                raise RawArithmeticError(f"{name} on {args[0].dtype}: convert to float32 right after the load")
            return plain(self, *args)

        return run

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs"):
        setattr(builder, name, guarded(name, getattr(builder, name)))

    plain_check = ReduceScanOpInterface.check_tensor

    def check(self: Any, inputs: Any) -> None:
        if any(map(_raw, inputs)):
            raise RawArithmeticError("a reduction of raw bits: convert to float32 first")
        plain_check(self, inputs)

    ReduceScanOpInterface.check_tensor = check


def _install_loop_bounds() -> None:
    """Triton 3.6 keeps a number as an array of one, which NumPy 2.4 and later no longer takes for an index."""
    plain_patch = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        plain_patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch


def _install_single_patching() -> None:
    """Every call of a device function patches the whole language again, which is most of the time that a small kernel
    takes: once a launch is enough."""
    patched: set[tuple[bool, bool]] = set()
    modules: dict[int, tuple[bool, bool]] = {}  # by the globals of a kernel's file, which stay
    plain_patch, plain_run = interpreter._patch_lang, interpreter.InterpretedFunction.run

    def patch(fn: Any) -> Any:
        key = modules.get(id(fn.__globals__))
        if key is None:
            named = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
            key = modules[id(fn.__globals__)] = (tl in named, tl.core in named)
        if key in patched:
            return interpreter._LangPatchScope()
        patched.add(key)
        return plain_patch(fn)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return plain_run(self, *args, **kwargs)

    interpreter._patch_lang = patch
    interpreter.InterpretedFunction.run = run  # type: ignore[method-assign]


def _install_memory() -> None:
    """What the interpreter works out anew at every operation, from a type or a shape alone, is worked out once: that
    was a third of its time."""
    dtypes: dict[str, Any] = {}
    plain_dtype = interpreter._get_np_dtype

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return plain_dtype(scalar)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = plain_dtype(scalar)
        return dtypes[scalar.name]

    interpreter._get_np_dtype = np_dtype

    plain_unwrap = core._unwrap_if_constexpr
    same = (int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type)

    def unwrap(value: Any) -> Any:
        kind = type(value)
        return value.value if kind is tl.constexpr else value if kind in same else plain_unwrap(value)

    core._unwrap_if_constexpr = unwrap

    # A block's type is made once a launch, and keeps what every tensor of it has.
    types: dict[tuple[Any, ...], Any] = {}
    plain_type, plain_tensor, plain_run = (
        tl.block_type.__init__, tl.tensor.__init__, interpreter.InterpretedFunction.run,
    )  # fmt: skip

    def new_type(cls: Any, element: Any, shape: Any) -> Any:
        sizes = tuple([size.value if type(size) is tl.constexpr else size for size in shape])
        key = (id(element), sizes)
        if key not in types:
            made = object.__new__(cls)
            plain_type(made, element, list(sizes))
            types[key] = made
        return types[key]

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        known = vars(type).get("of_tensors")
        if known is None:
            plain_tensor(self, handle, type)
            own = ("handle", "type", "dtype")
            type.of_tensors = {key: value for key, value in vars(self).items() if key not in own}
        else:
            vars(self).update(known, handle=handle, type=type, dtype=type.scalar)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        types.clear()
        return plain_run(self, *args, **kwargs)

    tl.block_type.__new__, tl.block_type.__init__ = new_type, lambda self, element, shape: None
    tl.tensor.__init__ = new_tensor
    interpreter.InterpretedFunction.run = run

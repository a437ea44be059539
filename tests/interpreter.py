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
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

RAW = {tl.bfloat16: torch.bfloat16, tl.float8e5: torch.float8_e5m2, tl.float8e4nv: torch.float8_e4m3fn}
_TORCH = {**RAW, tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}


class RawArithmeticError(TypeError):
    """Arithmetic on a type that the interpreter only knows as bits."""


def _raw(value: Any) -> bool:
    return isinstance(value, TensorHandle | tl.tensor) and value.dtype.scalar in RAW


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
    plain_patch, plain_run = interpreter._patch_lang, interpreter.InterpretedFunction.run

    def patch(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        key = (tl in modules, tl.core in modules)
        if key in patched:
            return interpreter._LangPatchScope()
        patched.add(key)
        return plain_patch(fn)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return plain_run(self, *args, **kwargs)

    interpreter._patch_lang = patch
    interpreter.InterpretedFunction.run = run  # type: ignore[method-assign]

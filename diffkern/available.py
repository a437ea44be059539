"""Which backends can run on this machine at all. Each answer is found once: every call of an op asks for it."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from diffkern import native


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: decided once, as Triton does when imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_gpu() -> bool:
    """Asked once: the driver's answer takes as long as a small kernel, and every call would wait for it."""
    return torch.cuda.is_available()


@functools.cache
def availability(backend: str) -> str | None:
    """None when the backend can run on this machine at all, else the reason why not."""
    if backend in native.LIBRARIES:
        return native.why_not(backend)
    if backend == "triton":
        if not _triton_installed():
            return "triton is not installed (pip install 'diffkern[triton]')"
        if not triton_interpreted() and not _has_gpu():
            return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None

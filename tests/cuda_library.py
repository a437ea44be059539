"""The CUDA kernels for tests: on the GPU, or on a machine without one made by a C++ compiler into a library that runs
them on CPU tensors (cuda_on_cpu/cuda_runtime.h)."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from filelock import FileLock

from diffkern import native, toolchain
from diffkern.available import availability
from diffkern.op import OPS

NAMES = sorted(name for name, op in OPS.items() if any(b.name == "cuda" for b in op.backends))


def recipe() -> toolchain.Recipe:
    compiler = toolchain.find_compiler()
    # -O1: quick to compile. Products and sums are fused where the source says so and nowhere else.
    flags = (
        f"-O1 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET}"
    )
    shim = f"-DDIFFKERN_KEY=CPU -I{Path(__file__).with_name('cuda_on_cpu')} -include cuda_runtime.h -x c++"
    return toolchain.Recipe("cuda", f"{compiler} {flags} {shim}", f"{compiler} -shared", "", 0)


@contextlib.contextmanager
def loaded(folder: Path) -> Iterator[Path | None]:
    """While it lasts, the `cuda` backend runs: on the CPU, by the library that is given, built once in the folder, if
    there is no GPU. Skips the test where it cannot."""
    if torch.cuda.is_available():
        if (reason := availability("cuda")) is not None:
            pytest.skip(reason)
        yield None
        return
    library = folder / "diffkern_cuda_on_cpu.so"
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            try:
                made = recipe()
            except toolchain.BuildError as error:
                pytest.skip(str(error))
            toolchain.build(library, made, library.with_suffix(".log"))
    torch.ops.load_library(str(library))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(native._reasons, "cuda", None)
            availability.cache_clear()
            for name in NAMES:
                here = [dataclasses.replace(b, devices=("cpu",)) if b.name == "cuda" else b for b in OPS[name].backends]
                patch.setattr(OPS[name], "backends", here)
            yield library
    finally:
        availability.cache_clear()


class Launched(ctypes.Structure):
    """How many kernels were launched on the CPU, and of the last one the clusters, their blocks, and a block's
    threads."""

    _fields_: ClassVar = [(name, ctypes.c_uint) for name in ("kernels", "clusters", "blocks", "threads")]


def launched(library: Path) -> Launched:
    return Launched.in_dll(ctypes.CDLL(str(library)), "cuda_on_cpu_launched")

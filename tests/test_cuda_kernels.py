"""The CUDA kernels and their launchers on a machine without a GPU: a C++ compiler makes csrc/cuda into a library that
runs them on CPU tensors (cuda_on_cpu/cuda_runtime.h). What only a GPU has, its approximate functions, is exact here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from diffkern import native, toolchain
from diffkern.op import OPS
from diffkern.testing import check, tensors

OPS_IN_CUDA = sorted(name for name, op in OPS.items() if any(b.name == "cuda" for b in op.backends))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHIM = Path(__file__).with_name("cuda_on_cpu")


def recipe() -> toolchain.Recipe:
    compiler = toolchain.find_compiler()
    # -O1: quick to compile. Fused only where the source says so, as is every sum of a kernel whose bits matter.
    flags = (
        f"-O1 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET}"
    )
    shim = f"-DDIFFKERN_KEY=CPU -I{SHIM} -include cuda_runtime.h -x c++"
    return toolchain.Recipe("cuda", f"{compiler} {flags} {shim}", f"{compiler} -shared", "", 0)


@pytest.fixture(scope="module", autouse=True)
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The `cuda` backend takes CPU tensors."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU itself")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    library = folder / "diffkern_cuda_on_cpu.so"
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            try:
                toolchain.build(library, recipe(), library.with_suffix(".log"))
            except toolchain.BuildError as error:
                if "no C++ compiler" in str(error):
                    pytest.skip(str(error))
                raise
    torch.ops.load_library(str(library))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native._reasons, "cuda", None)
        for name in OPS_IN_CUDA:
            here = [dataclasses.replace(b, devices=("cpu",)) if b.name == "cuda" else b for b in OPS[name].backends]
            patch.setattr(OPS[name], "backends", here)
        yield


CALLS = [
    pytest.param(name, sample, id=f"{name}-{sample.name}-{str(dtype)[6:]}")
    for name in OPS_IN_CUDA
    for dtype in DTYPES
    for sample in OPS[name].make_samples("cpu", dtype)  # type: ignore[misc]
    if not sample.workload
]


@pytest.mark.parametrize(("name", "sample"), CALLS)
def test_agrees_with_the_oracle(name, sample):
    args = OPS[name].bind(*sample.args())
    backend = next(b for b in OPS[name].backends if b.name == "cuda")
    if (reason := backend.why_not(args)) is not None:
        pytest.skip(reason)
    check(OPS[name], "cuda", args)


@pytest.mark.parametrize(("name", "sample"), CALLS)
def test_blocks_may_run_in_any_order(name, sample, monkeypatch):
    args = OPS[name].bind(*sample.args())
    backend = next(b for b in OPS[name].backends if b.name == "cuda")
    if (reason := backend.why_not(args)) is not None:
        pytest.skip(reason)
    forwards = tensors(backend(*args))
    monkeypatch.setenv("CUDA_ON_CPU_REVERSED", "1")
    for a, b in zip(forwards, tensors(backend(*args)), strict=True):
        assert torch.equal(a, b)

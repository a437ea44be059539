"""A GPU that is not there, for pytest: `PYTEST_PLUGINS=fake_gpu` runs what is tested on a GPU with tensors that have no
numbers. Everything up to a launch is real, and so is Triton's compiler: it is asked for just the kernels that an H200
would be asked for. What compares numbers may fail; what is true of them is taken to be so.

For triton_cache.py. CPU tensors stay real, for schedules and settings are read from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_impls, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ARCH = 90
_SHARED = 227 * 1024
compiled: dict[str, float] = {}  # seconds that Triton took, by the names of its entries; 0 where one was there


class Graph:
    """In place of a CUDA graph, a stream and an event: whatever it is asked to do is done."""

    cuda_stream = 0

    def __init__(self, *args: Any, **more: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **more: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph)

    def __hash__(self) -> int:
        return 0


_capturing = [False]


@contextlib.contextmanager
def _capture(*args: Any, **more: Any) -> Iterator[None]:
    _capturing[0] = True
    try:
        yield
    finally:
        _capturing[0] = False


def _stand_in_for_cuda() -> None:
    facts = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30, L2_cache_size=60 << 20
    )
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_capability": (9, 0), "get_device_name": facts.name, "get_device_properties": facts,
        "synchronize": None, "empty_cache": None, "manual_seed": None, "manual_seed_all": None, "set_device": None,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "reset_peak_memory_stats": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "current_stream": Graph(), "default_stream": Graph(),
        "device": contextlib.nullcontext(), "stream": contextlib.nullcontext(), "set_sync_debug_mode": None,
        "mem_get_info": (140 << 30, 140 << 30), "is_bf16_supported": True, "graph_pool_handle": (0, 0),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **more: answer)
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.CUDAGraph = Graph  # type: ignore[misc, assignment]
    torch.cuda.graph = _capture  # type: ignore[assignment, misc]
    torch.cuda.is_current_stream_capturing = lambda: _capturing[0]


class OnGPU(TorchDispatchMode):
    """What concerns a GPU is done without numbers, the rest as ever."""

    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        there = device is not None and torch.device(device).type == "cuda"
        if there or any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return _on_cpu(device="cpu")


_on_cpu = torch.Generator


def _moved(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`Module._apply`, which puts a tensor without numbers into the place of one with them in ways that this one has
    not."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, p in module._parameters.items():
        if p is not None:
            with torch.no_grad():
                module._parameters[name] = nn.Parameter(fn(p), p.requires_grad)
    for name, b in module._buffers.items():
        if b is not None:
            module._buffers[name] = fn(b)
    return module


def _take_numbers_for_granted() -> None:
    aten = torch.ops.aten
    answers: dict[Any, Any] = {
        aten._local_scalar_dense.default: lambda mode, func, x: 1.0 if x.is_floating_point() else 1,
        aten.equal.default: lambda *args: True,
        aten._unique2.default: lambda mode, func, x, *args: (x.flatten(), torch.zeros_like(x, dtype=torch.int64), x),
    }
    fake_impls.op_implementations_dict.update(answers)
    fake_tensor.init_gpu_context = lambda device: None  # type: ignore[assignment]
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment, method-assign]
    torch._C._set_only_lift_cpu_tensors(True)
    # The address that the allocator would give, as far as a kernel's alignment goes.
    FakeTensor.data_ptr = lambda self: int(self.storage_offset()) * self.element_size()  # type: ignore
    torch.Generator = _Generator  # type: ignore[misc]
    nn.Module._apply = _moved  # type: ignore[method-assign, assignment]


def _stand_in_for_driver() -> None:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        load_binary=lambda *args: (1, 1, 32, 0, 1024),  # module, function, registers, spills, threads
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": _SHARED, "multiprocessor_count": 132},
    )
    driver = SimpleNamespace(
        utils=utils,
        launcher_cls=lambda source, metadata: lambda *args: None,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", ARCH, 32),
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]

    def count(src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        compiled[metadata["hash"]] = compiled.get(metadata["hash"], 0.0) + (0.0 if cache_hit else times.total / 1e6)

    knobs.compilation.listener = count


def _stand_in_for_ops() -> None:
    """An op runs what it would choose: PyTorch would ask it for shapes only."""
    from diffkern import native
    from diffkern.op import OPS, Op

    native._reasons["cuda"] = None

    def call(self: Op, *args: Any, **kwargs: Any) -> Any:
        args = self.bind(*args, **kwargs)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return (self.reference if self.grad is None else self.grad)(*args)
        return self._run(args)

    Op.__call__ = call  # type: ignore[method-assign]
    for op in OPS.values():
        op.overload = op._dispatch  # type: ignore[assignment]
        # The CUDA library runs nothing here, and its results have the reference's shapes.
        there = [dataclasses.replace(b, run=op.reference) if b.name == "cuda" else b for b in op.backends]
        op.backends[:] = there


_stand_in_for_cuda()
_take_numbers_for_granted()
_stand_in_for_driver()
_stand_in_for_ops()
with OnGPU():  # once with a number: without one, the first time, PyTorch asks the driver which GPU is meant
    torch.zeros(1).to("cuda:0")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    with OnGPU():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[Any]:
    with OnGPU():
        return (yield)


def pytest_sessionfinish() -> None:
    name = f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.json"
    Path(os.environ["DIFFKERN_COMPILED"], name).write_text(json.dumps(compiled))

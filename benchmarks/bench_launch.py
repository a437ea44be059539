"""What a call of an op costs the CPU before its Triton kernels run, on a machine without a GPU.

    python benchmarks/bench_launch.py                       # every op that has Triton kernels
    python benchmarks/bench_launch.py --op rms_norm --plain  # by Triton's own way of launching

Everything on the way to a launch is real: the op's dispatch, the choice of a backend, the launcher, and what Triton
does with the arguments. Stand-ins take the place of the compiler and of the driver's launch, which does nothing; the
tensors are small ones on the CPU. What PyTorch's own kernels take, of convolutions and products, is in the figures.
Times compare two versions on one machine; the number of Python functions that a call runs says the same on any.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import timeit
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from diffkern import available
from diffkern.op import OPS, Backend, Op

CALLS, ROUNDS = 50, 20


class Launcher:
    """In place of the function that starts a compiled kernel. Keeps what it was last asked to start."""

    last: tuple[Any, ...] = ()

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        Launcher.last = (self, *args)


class Utils:
    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class Driver:
    """In place of Triton's driver: device 0 of an H100."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_nothing(source: Any, target: GPUTarget, options: dict[str, Any], **more: Any) -> CompiledKernel:
    """In place of Triton's compiler: a kernel that can be launched on `Driver`."""
    made = CompiledKernel.__new__(CompiledKernel)
    facts = {"num_warps": options["num_warps"], "shared": 0, "num_ctas": 1, "warp_size": 32, "tmem_size": None}
    made.__dict__.update(
        src=source, metadata=SimpleNamespace(target=target, **facts), packed_metadata=(), metadata_group={}, kernel=b"",
        name=source.fn.__name__, hash="", module=None, function=None, _run=None, _module_pid=None,
    )  # fmt: skip
    return made


def stand_in() -> None:
    """For the rest of this process ops launch Triton's kernels, and nothing runs."""
    if available.triton_interpreted():
        raise SystemExit("unset TRITON_INTERPRET: the interpreter launches in another way")
    triton.compiler.compile = compile_nothing
    triton.runtime.driver.set_active(Driver())
    os.environ["DIFFKERN_BACKEND"] = "triton"
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    available._has_gpu = lambda: True  # type: ignore[assignment]
    for op in OPS.values():
        op.backends[:] = [dataclasses.replace(b, devices=("cpu",)) if b.name == "triton" else b for b in op.backends]


def triton_of(op: Op) -> Backend | None:
    """The op's backend in Triton, if it has one."""
    return next((b for b in op.backends if b.name == "triton"), None)


def functions(call: Callable[[], Any]) -> int:
    """How many Python functions a call runs."""
    ran = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal ran
        ran += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return ran


def sample_of(op: Op) -> Callable[[], Any]:
    """A call of the op's first sample, by Triton, made once before."""
    args = next(s for s in op.make_samples("cpu", torch.bfloat16) if not s.workload).args()
    op(*args)
    return partial(op, *args)


def main() -> None:
    names = sorted(name for name, op in OPS.items() if triton_of(op))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=names, default=names, metavar="OP", help=f"of {', '.join(names)}")
    parser.add_argument("--plain", action="store_true", help="launch as Triton does, with nothing remembered")
    options = parser.parse_args()
    stand_in()
    if options.plain:
        from diffkern.kernels.launch import Remembered

        Remembered.launch = lambda self, grid, *args, **more: self.kernel[grid](*args, **more)  # type: ignore[method-assign]
    print(f"{'op':32}{'us a call':>10}{'functions':>11}")
    for name in options.op:
        call = sample_of(OPS[name])
        seconds = min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS
        print(f"{name:32}{seconds * 1e6:10.1f}{functions(call):11}")


if __name__ == "__main__":
    main()

"""Compiles Triton kernels for GPUs that are not here, just as their launchers ask for them, and reads the machine code.

    python tests/compile_kernels.py ARCH...     prints a JSON list, one entry per kernel, variant and architecture

It runs in a process of its own: Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from diffkern.kernels import configs
from diffkern.kernels.launch import Remembered
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from diffkern.backend import use_backend
from diffkern.op import OPS

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
             torch.bool: "*i1"}  # fmt: skip
# Ops whose kernel is one of several ways, with a choice of tiles; and the kernel.
_PRODUCTS = {"linear": "linear", "conv2d": "conv2d", "conv2d_moments": "conv2d"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_jobs: list[tuple[str, Launch, int]] = []


class Launch(NamedTuple):
    """A kernel as a launcher asked for it: what Triton compiles, as repr so that equal ones are found."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    def uses_tma(self) -> bool:
        """Whether it takes a tensor by descriptor. sm_80 has no such hardware, and launchers do not ask it."""
        return any(kind.startswith("tensordesc") for kind in self.signature.values())

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)


def describe(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton's launch would specialise on: None, 1 and constexpr values, and divisibility by 16."""
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    launch = Launch(kernel, {}, {}, {}, options)
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        launch.signature[param.name] = "constexpr"
        if param.name == "FAST":
            launch.constexprs["FAST"] = True  # the tensors that stand in here are on the CPU
        elif param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            launch.constexprs[param.name] = value
        elif isinstance(value, TensorDescriptor):
            launch.signature[param.name] = f"tensordesc<{_POINTERS[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, Tensor):
            launch.signature[param.name] = _POINTERS[value.dtype]
            launch.attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            launch.signature[param.name] = "fp32"
        else:
            launch.signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                launch.attrs[(i,)] = [["tt.divisibility", 16]]
    return launch


def _only(name: str, shape: configs.Shape | None) -> Callable[[str, str], configs.Shape | None]:
    return lambda kernel, key: shape if kernel == name else None


def _keys_that_stay(kernel: str, key: str) -> configs.Shape | None:
    """A shape of attention that tables alone choose, and no default: for another kernel."""
    facts = dict(fact.rsplit(" ", 1) for fact in key.split(", "))
    if facts["bytes"] == "4" or facts["masked"] == "2" or int(facts["dim"]) > 80 or int(facts["keys"]) > 128:
        return None
    return {"QUERIES": 64, "KEYS": 128, "PARTS": 1, "BLOCKS": 4, "num_warps": 4, "num_stages": 3}


def launches(name: str) -> dict[str, Launch]:
    """The launches of an op that differ in structure: its workloads in float16 and float32, then what its small samples
    (odd sizes, missing inputs, other layouts) add to them."""
    found: dict[str, Launch] = {}
    seen: set[str] = set()

    def record(remembered: Remembered, grid: Any, *args: Any, **kwargs: Any) -> None:
        kernel, launch = remembered.kernel, describe(remembered.kernel, args, kwargs)
        flags = {k: v > 1 if type(v) is int else v for k, v in launch.constexprs.items()}
        structure = f"{kernel.__name__} {flags} {launch.options}"
        key = f"{structure} {launch.signature}" if workload else structure
        if key not in seen:
            found[f"{kernel.__name__}, {label}"] = launch
        seen.update((key, structure))

    Remembered.launch = record  # type: ignore[method-assign]
    run = next(b for b in OPS[name].backends if b.name == "triton")
    # What is chosen; then every other cut that could be, where only the tile differs: of one, all variants.
    product = _PRODUCTS.get(name, name)
    cuts = importlib.import_module(f"diffkern.kernels.{product}").CUTS if name in _PRODUCTS else ()
    trials = {cut: _only(product, None if cut is None else cut._asdict()) for cut in (None, *cuts)}
    if name == "attention":
        trials[("keys that stay",)] = _keys_that_stay
    for cut, trial in trials.items():
        for workload, dtypes in ((True, (torch.float16, torch.float32)), (False, (torch.bfloat16,))):
            for dtype in dtypes if workload or cut in (None, *cuts[:1]) else ():
                for sample in OPS[name].make_samples("cpu", dtype):  # type: ignore[misc]
                    tile = "" if cut is None else f"{'-'.join(map(str, cut))}, "
                    label = f"{tile}{sample.name}, {str(dtype)[6:]}"
                    if sample.workload == workload:
                        with FakeTensorMode(), use_backend("triton"), configs.trying(trial):
                            run(*sample.args())
    return found


def compile_job(job: int) -> dict[str, Any]:
    """Compile for one architecture (80, 90, 100). The `text` is the machine code."""
    label, launch, arch = _jobs[job]
    built = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
    return {
        "kernel": launch.kernel.__name__,
        "label": f"{label}, sm_{arch}",
        "arch": arch,
        "workload": not label.endswith("bfloat16"),
        "constexprs": launch.constexprs,
        "threads": 32 * built.metadata.num_warps,
        "shared": built.metadata.shared,
        "scratch": built.metadata.global_scratch_size,
        **{name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)},
        "doubles": re.findall(r"\w+\.f64\S*", built.asm["ptx"]),
        "text": text_of(built.asm["cubin"]),
    }


def text_of(elf: bytes) -> bytes:
    """The instructions in a cubin: its sections named .text, by the table of sections of ELF for 64 bits."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<3H", elf, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", elf, table + i * size) for i in range(count)]
    named = [(elf[sections[names][1] + name :], elf[start : start + length]) for name, start, length in sections]
    return b"".join(content for name, content in named if name.startswith(b".text."))


def read(found: list[dict[str, Any]]) -> None:
    """Put what the machine code says in the place of each `text`. All of an architecture is disassembled at once: for
    one kernel, to start takes longer than the work."""
    for arch in {v["arch"] for v in found}:
        those = [v for v in found if v["arch"] == arch]
        with tempfile.NamedTemporaryFile(suffix=".bin") as binary:
            binary.write(b"".join(v["text"] for v in those))
            binary.flush()
            as_arch = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
            listing = _tool("nvdisasm", "-c", "--no-dataflow", "-b", as_arch, binary.name)
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", listing)
        assert len(opcodes) == sum(len(v["text"]) for v in those) // 16  # bytes an instruction
        rest = iter(opcodes)
        for v in those:
            code = list(itertools.islice(rest, len(v.pop("text")) // 16))
            while code and code[-1] in ("NOP", "BRA"):  # padding behind the end
                code.pop()
            v |= {
                "instructions": len(code),
                "tma": sum(op.startswith("UTMALDG") for op in code),
                "tensor_cores": sum(op.startswith(("HGMMA", "HMMA", "UTCHMMA")) for op in code),
                "wgmma": sum(op.startswith("HGMMA") for op in code),
                "wide_loads": sum(re.match(r"LDG(STS)?\.E\b.*\.128\b", op) is not None for op in code),
                "wide_stores": sum(op.startswith("STG.E.128") for op in code),
                "spills": [op for op in code if op.startswith(("LDL", "STL"))],
            }
            v["doubles"] += [op for op in code if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+.*\.F64", op)]


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def main(archs: list[int]) -> None:
    # The first architecture gets every launch, the others one of each kernel. Tables of shapes are by architecture.
    for arch in archs:
        configs.architecture = lambda device, arch=arch: arch
        for name in (name for name, op in OPS.items() if any(b.name == "triton" for b in op.backends)):
            others: dict[str, str] = {}
            for label, launch in launches(name).items():
                first = others.setdefault(launch.kernel.__name__, label) == label
                runs = arch >= 90 or not launch.uses_tma()
                if runs and (arch == archs[0] or first):
                    _jobs.append((label, launch, arch))
    # Forked, because a kernel does not pickle.
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(compile_job, range(len(_jobs))))
    read(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])

"""What is here, what is ready, and why not: the facts that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import diffkern
from diffkern import native, toolchain
from diffkern.available import availability
from diffkern.backend import BACKENDS, forced_backend
from diffkern.models.bundle import bundled
from diffkern.op import OPS

PACKAGES = ("torch", "triton", "diffusers", "numpy", "safetensors", "ninja", "matplotlib", "scikit-learn")
TOOLS = {"c++": toolchain.find_compiler, "nvcc": toolchain.find_nvcc}


def device_name(device: torch.device | str) -> str:
    """A device in words, with the number of threads for a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({cpu_name()}, {threads} thread{'s' if threads > 1 else ''})"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_instructions() -> str:
    """The best of the CPU's vector instructions that products can use: what a figure depends on most."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else torch.backends.cpu.get_cpu_capability()


def report() -> dict[str, Any]:
    """Everything that `diffkern doctor` prints. Asking whether a native library is ready builds it if need be."""
    cache = native.cache_folders()[0]
    files = [f for f in cache.rglob("*") if f.is_file()] if cache.is_dir() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "diffkern": diffkern.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            **{name: _tool(name) for name in TOOLS},
        },
        "devices": {
            "cpu": f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads, {cpu_instructions()}",
            **{f"cuda:{i}": name for i, name in enumerate(gpus)},
        },
        "backends": {name: availability(name) or "ready" for name in BACKENDS},
        "forced backend": forced_backend(),
        "ops": {name: [b.name for b in op.all_backends()] for name, op in sorted(OPS.items())},
        "models": bundled(),
        "cache": {"path": str(cache), "files": len(files), "bytes": sum(f.stat().st_size for f in files)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str) -> str | None:
    """The line of a compiler's `--version` that names it, and where it is; None if it is not there."""
    try:
        path = TOOLS[name]()
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except toolchain.BuildError:
        return None
    except (OSError, subprocess.TimeoutExpired):
        return "does not answer"
    lines = [line for line in done.stdout.splitlines() if any(c.isdigit() for c in line)]
    return f"{lines[-1 if name == 'nvcc' else 0].strip()} ({path})" if lines else f"does not say ({path})"


def main(as_json: bool = False) -> None:
    """Print the report, as text or as JSON."""
    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for title, values in facts.items():
        print(title)
        for name, value in _rows(values):
            print(f"  {name:<16} {value}".rstrip())


def _rows(values: Any) -> list[tuple[str, Any]]:
    if isinstance(values, dict):
        return [(k, ", ".join(v) if isinstance(v, list) else "not here" if v is None else v) for k, v in values.items()]
    if isinstance(values, list):
        return [(v, "") for v in values]
    return [("none" if values is None else values, "")]

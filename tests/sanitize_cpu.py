"""Runs the tests of the ops on a C++ library built with AddressSanitizer and UndefinedBehaviorSanitizer, and writes
docs/sanitizers.json:

    python tests/sanitize_cpu.py [--cache DIR]      (Linux, GCC; some minutes, most of them to compile)

The first finding ends the run, and no record is written. Leaks are not looked for: Python itself never frees all of its
memory. Triton's kernels and the references, which are not in that library, are left out, and how glibc keeps memory:
the sanitizer allocates in its own way. Compiled otherwise, sums round otherwise: tests of the last digits may fail, and
are named in the record. The six of `group_norm_silu_backward` do so in the same way without sanitizers, if GCC makes no
vectors of loops (-O2 -fno-tree-vectorize -fno-tree-slp-vectorize -fno-openmp-simd), and pass at -O2 with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from diffkern import toolchain

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "sanitizers.json"
FLAGS = "-O2 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
TESTS = (
    "ops", "fuzz", "fuzz_found", "arguments", "linear", "implicit_gemm", "winograd", "winograd_integers", "taps",
    "packing", "vlb_term",
)  # fmt: skip
LEFT_OUT = "not triton and not -reference and not compile and not opcheck and not freed_memory"


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def compiler(folder: Path) -> Path:
    """A compiler that adds the sanitizers: the loader then builds a library of its own with it."""
    made = folder / "sanitizing-c++"
    made.write_text(f'#!/bin/sh\nexec {toolchain.find_compiler()} "$@" {FLAGS}\n')
    made.chmod(0o755)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where to keep the library that is built (default: nowhere)")
    options = parser.parse_args()
    changed = output("git", "status", "--porcelain", "--", "csrc", "diffkern", "tests")
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = os.environ | OPTIONS
        environment |= {"CXX": str(compiler(cache)), "DIFFKERN_CACHE": str(cache), "DIFFKERN_BACKEND": "auto"}
        # Without the preloaded runtime, which would slow the compiler down, the library is built and cannot be loaded.
        build = "from diffkern import native; native.why_not('cpu')"
        subprocess.run([sys.executable, "-c", build], env=environment, check=False)
        gcc = toolchain.find_compiler()
        runtimes = [output(gcc, f"-print-file-name={name}.so") for name in ("libasan", "libubsan", "libstdc++")]
        environment["LD_PRELOAD"] = " ".join(runtimes)
        loads = "from diffkern import native; import sys; sys.exit(native.why_not('cpu'))"
        subprocess.run([sys.executable, "-c", loads], env=environment, check=True)
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
        pytest = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider"]
        command = [*pytest, "-k", LEFT_OUT, *files]
        print(" ".join(command), flush=True)
        run = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        passed = re.search(r"(\d+) passed", lines[-1]) if run.wait() in (0, 1) else None
    if passed is None:
        return run.returncode or 1
    record = {
        "commit": output("git", "rev-parse", "HEAD") + (" and changes" if changed else ""),
        "date": date.today().isoformat(),
        "compiler": output(gcc, "--version").splitlines()[0],
        "flags": FLAGS,
        "options": OPTIONS,
        "level": toolchain.levels()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sources": toolchain.source_hash("cpu"),
        "tests": [f"test_{name}.py" for name in TESTS],
        "left out": LEFT_OUT,
        "passed": int(passed[1]),
        "failed": [re.sub(r"^FAILED (.*?)( - .*)?$", r"\1", line) for line in lines if line.startswith("FAILED ")],
        "findings": 0,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(RECORD)
    return 0


if __name__ == "__main__":
    sys.exit(main())

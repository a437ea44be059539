"""What the native libraries are made of, and how: their sources, compilers and flags, the build, and the record of it.

There are two, of one making: `cpu` (csrc/cpu/*.cpp, a C++ compiler) and `cuda` (csrc/cuda/*.cu, nvcc). Both know
PyTorch's stable ABI and nothing else of it, and load into any torch, also `cuda` on a machine without a GPU.

Only the standard library is imported at the top: setup.py runs this file by its path, to build ahead of time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).resolve().parent
# A stable-ABI library built against these headers loads into this torch and every later one.
TORCH_TARGET = "0x020b000000000000"
# No -ffast-math: NaN and infinity must mean what they mean. sqrt need not set errno, and nobody reads the FP flags.
_FLAGS = (
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd "
    f"-Wno-unknown-pragmas -DTORCH_TARGET_VERSION={TORCH_TARGET}"
)
_LEVEL_FLAGS = {
    "x86-64-v4-bf16": "-march=x86-64-v4 -mavx512bf16 -mavx512vnni -mprefer-vector-width=512",
    "x86-64-v4": "-march=x86-64-v4 -mprefer-vector-width=512",
    "x86-64-v3": "-march=x86-64-v3",
    "x86-64-v2": "-march=x86-64-v2",
    "x86-64": "-march=x86-64",
    "native": "-mcpu=native",  # not x86
}
AHEAD_OF_TIME_LEVELS = ("x86-64-v3", "x86-64-v4", "x86-64-v4-bf16")
# The flags of /proc/cpuinfo that a level adds to the one below it (System V psABI, section 3.1.1); the best is ours.
_LEVEL_FEATURES = {
    "x86-64-v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v4-bf16": "avx512_bf16 avx512_vnni",
}
_CUDA_FLAGS = f"-O3 -std=c++20 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -DTORCH_TARGET_VERSION={TORCH_TARGET}"
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
OLDEST_GPU = (8, 0)  # the first with bfloat16 arithmetic


class BuildError(RuntimeError):
    """A library cannot be built. The message says why."""


class Recipe(NamedTuple):
    """How a library is made on this machine."""

    name: str
    compile: str  # the compiler and its flags; -c IN -o OUT follows
    link: str
    identity: str  # which compiler that is, in its own words
    seconds: int  # what a build takes on two cores of 2023

    @property
    def suffix(self) -> str:
        """Of the sources that are compiled; the others are included."""
        return ".cu" if self.name == "cuda" else ".cpp"


def cpu_recipe(level: str) -> Recipe:
    """The library of the C++ kernels for one instruction-set level."""
    compiler = find_compiler()
    return Recipe("cpu", f"{compiler} {level_flags(level)}", f"{compiler} -shared", _version(compiler), 50)


def cuda_recipe(capabilities: Iterable[tuple[int, int]]) -> Recipe:
    """The library of the CUDA kernels for GPUs of these compute capabilities."""
    nvcc, host = find_nvcc(), find_compiler("CUDAHOSTCXX", "CXX")
    targets = gencode(capabilities, _architectures(nvcc))
    return Recipe(
        "cuda",
        f"{nvcc} -ccbin {host} {_CUDA_FLAGS} {targets}",
        f"{nvcc} -ccbin {host} -shared -cudart static",  # the user has torch's CUDA runtime, perhaps no other
        _version(nvcc) + _version(host),
        60,
    )


# ---------------------------------------------------------------------------------------------------------- the sources


def sources() -> Path:
    """The folder of the C++ and CUDA sources: in the wheel inside the package, in a checkout beside it."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def source_files(library: str) -> list[Path]:
    return sorted(f for folder in ("common", library) for f in (sources() / folder).glob("*.*"))


def hash_of(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def source_hash(library: str) -> str:
    return hash_of(*(part for f in source_files(library) for part in (f.name, f.read_bytes())))


# -------------------------------------------------------------------------------------------------------- the compilers


def find_compiler(*variables: str) -> str:
    """The C++ compiler: $CXX (or the first set of the named variables), else g++, c++ or clang++ in PATH. Raises
    BuildError if there is none."""
    for variable in variables or ("CXX",):
        if named := os.environ.get(variable):
            if (found := shutil.which(named)) is None:
                raise BuildError(f"there is no compiler {variable}={named}")
            return found
    if (found := next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)) is None:
        raise BuildError("there is no C++ compiler (g++, clang++)")
    return found


def find_nvcc() -> str:
    """CUDA's compiler: $CUDACXX, else bin/nvcc in $CUDA_HOME or $CUDA_PATH, else nvcc in PATH, else DEFAULT_NVCC.
    Raises BuildError if there is none."""
    if named := os.environ.get("CUDACXX"):
        if (found := shutil.which(named)) is None:
            raise BuildError(f"there is no compiler CUDACXX={named}")
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", DEFAULT_NVCC]
    if (found := next(filter(None, map(shutil.which, places)), None)) is None:
        raise BuildError("there is no nvcc (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda): Triton's kernels serve instead")
    return found


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the compiler {command[0]} does not run: {error}") from error


def _version(compiler: str) -> str:
    return _run(compiler, "--version")


def levels(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction-set levels that this CPU runs, best first. What cannot be read counts as missing."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["native"]
    try:
        lines = cpuinfo.read_text().splitlines()
        have = set(next(line for line in lines if line.startswith("flags")).split())
    except (OSError, StopIteration):
        have = set()
    found = ["x86-64"]
    for level, features in _LEVEL_FEATURES.items():
        if not have.issuperset(features.split()):
            break
        found.insert(0, level)
    return found


def level_flags(level: str) -> str:
    """The C++ compiler's flags for a library of one instruction-set level."""
    return f"{_FLAGS} {_LEVEL_FLAGS[level]}"


def _architectures(nvcc: str) -> set[int]:
    """The GPU architectures that this nvcc knows, as 80 for sm_80."""
    return {int(number) for number in re.findall(r"compute_(\d+)\b", _run(nvcc, "--list-gpu-arch"))}


def gencode(capabilities: Iterable[tuple[int, int]], known: set[int]) -> str:
    """nvcc's flags for machine code for GPUs of these compute capabilities; for one that this nvcc does not know yet,
    the newest code that it does know, for the driver to translate."""
    flags = set()
    for number in {major * 10 + minor for major, minor in capabilities}:
        suffix = "a" if number == 90 else ""  # with what exists on Hopper only, such as wgmma
        if number in known:
            flags.add(f"-gencode arch=compute_{number}{suffix},code=sm_{number}{suffix}")
        else:
            newest = max((k for k in known if k < number), default=None)
            if newest is None:
                raise BuildError(f"this nvcc does not know GPUs of compute capability {number / 10}")
            flags.add(f"-gencode arch=compute_{newest},code=compute_{newest}")
    return " ".join(sorted(flags))


# ------------------------------------------------------------------------------------------------------------ the build


def build(library: Path, recipe: Recipe, log: Path) -> None:
    """Compile and link the library, and write its record. Raises BuildError with the first error and the log's path."""
    import torch

    root = Path(torch.__file__).parent
    objects, rules = [], []
    for source in source_files(recipe.name):
        if source.suffix == recipe.suffix:
            objects.append(f"{source.stem}.o")
            rules.append(f"build {objects[-1]}: compile {_escape(source)}")
    lines = [
        f"compile = {recipe.compile} -isystem {_escape(root / 'include')}",
        "rule compile",
        "  command = $compile -c $in -o $out",
        "rule link",
        f"  command = {recipe.link} -o $out $in -L{_escape(root / 'lib')} -ltorch_cpu",
        *rules,
        f"build {library.name}: link {' '.join(objects)}",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="diffkern-") as work:
        Path(work, "build.ninja").write_text("\n".join(lines))
        done = subprocess.run([_ninja(), "-C", work], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log.write_text(done.stdout)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            raise BuildError(f"the build failed: {(errors or ['no reason given'])[0].strip()} (log: {log})")
        write_record(library, recipe.name, made=Path(work, library.name))  # of what was linked, not of what a disk kept
        shutil.copyfile(Path(work, library.name), library)


def _ninja() -> str:
    try:
        from ninja import BIN_DIR

        return os.path.join(BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja is not installed (pip install ninja)") from None
        return found


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ahead_of_time_path(folder: Path, level: str) -> Path:
    """Where a wheel carries the cpu library of a level."""
    return folder / "lib" / f"diffkern_cpu-{level}.so"


def record_of(library: Path) -> Path:
    """Where what a library is stands written: beside it."""
    return library.with_suffix(".json")


def _record(library: Path, name: str) -> dict[str, str]:
    return {"sha256": hash_of(library.read_bytes()), "sources": source_hash(name)}


def write_record(library: Path, name: str, made: Path | None = None) -> None:
    """Write beside a library what it is: its sha256 and that of its sources. made: the library, where it is not there
    yet."""
    record_of(library).write_text(json.dumps(_record(made or library, name)))


def intact(library: Path, name: str) -> bool:
    """Whether the library is the one that its record was written for, and the sources are too."""
    try:
        return json.loads(record_of(library).read_text()) == _record(library, name)
    except (OSError, ValueError):
        return False

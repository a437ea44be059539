"""Finds, else builds, and loads the native libraries. Nothing happens before the first use of one.

A library is taken from the wheel if it was built ahead of time, else from the cache, else it is built into the cache:
`$DIFFKERN_CACHE`, or `$XDG_CACHE_HOME/diffkern`, or `~/.cache/diffkern`, or a folder in the temporary directory. What
is in the cache is named for everything that it depends on (sources, torch, compiler, flags) and is loaded only if its
recorded sha256 is right. DIFFKERN_NO_BUILD=1 forbids building.

Only the standard library is imported at the top: setup.py runs this file by its path, to build ahead of time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIBRARIES = ("cpu", "cuda")

_PACKAGE = Path(__file__).resolve().parent
_SECONDS = 35  # what a build takes on two cores of 2023
# A stable-ABI library built against these headers loads into this torch and every later one.
_TORCH_TARGET = "0x020b000000000000"
# No -ffast-math: NaN and infinity must mean what they mean. sqrt need not set errno, and nobody reads the FP flags.
_FLAGS = (
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd "
    f"-Wno-unknown-pragmas -DTORCH_TARGET_VERSION={_TORCH_TARGET}"
)
_LEVEL_FLAGS = {
    "x86-64-v4-bf16": "-march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512",
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
    "x86-64-v4-bf16": "avx512_bf16",
}

_reasons: dict[str, str | None] = {}
_lock = threading.RLock()


class BuildError(RuntimeError):
    """A library cannot be built. The message says why."""


def why_not(library: str) -> str | None:
    """None when the library is loaded, else the reason why it is not. Loads it on the first call; the outcome is kept
    for the life of the process."""
    try:
        return _reasons[library]
    except KeyError:
        pass
    with _lock:
        if library not in _reasons:
            _reasons[library] = _load(library)
        return _reasons[library]


def _load(library: str) -> str | None:
    if library != "cpu":
        return f"the {library} library is not built yet in this release"
    if os.name != "posix":
        return f"the {library} library is not built on {platform.system()}"
    import torch

    try:
        path = _ahead_of_time() or _cached_or_built()
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # torch raises either for a library that does not load
        return f"the {library} library: {error}"
    return None


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


def sources() -> Path:
    """The folder of the C++ sources: in the wheel inside the package, in a checkout beside it."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def _source_files() -> list[Path]:
    return sorted(f for folder in ("common", "cpu") for f in (sources() / folder).glob("*.*"))


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def source_hash() -> str:
    return _hash(*(part for f in _source_files() for part in (f.name, f.read_bytes())))


# --------------------------------------------------------------------------------------------- a library and its record


def _record_of(library: Path) -> Path:
    return library.with_suffix(".json")


def write_record(library: Path) -> None:
    """Write beside a library what it is: its sha256 and that of its sources."""
    record = {"sha256": _hash(library.read_bytes()), "sources": source_hash()}
    _record_of(library).write_text(json.dumps(record))


def _intact(library: Path) -> bool:
    """Whether the library is the one that its record was written for, and the sources are too."""
    try:
        record = json.loads(_record_of(library).read_text())
        return record == {"sha256": _hash(library.read_bytes()), "sources": source_hash()}
    except (OSError, ValueError):
        return False


def ahead_of_time_path(folder: Path, level: str) -> Path:
    """Where a wheel carries the library of a level."""
    return folder / "lib" / f"diffkern_cpu-{level}.so"


def _ahead_of_time() -> Path | None:
    found = (ahead_of_time_path(_PACKAGE, level) for level in levels())
    return next((path for path in found if _intact(path)), None)


# ------------------------------------------------------------------------------------------------------------ the cache


def cache_folders() -> list[Path]:
    """Where built libraries are looked for, in order; the last one is private to the user but not kept for ever."""
    chosen = os.environ.get("DIFFKERN_CACHE")
    if not chosen:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        chosen = os.path.join(base, "diffkern")
    return [Path(chosen), Path(tempfile.gettempdir()) / f"diffkern-{os.getuid()}"]


def _check_private(folder: Path) -> None:
    """Raise PermissionError if another user could put a library here, for us to run."""
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o002:
        raise PermissionError(f"{folder} belongs to another user or everybody can write to it")


def _cached_or_built() -> Path:
    import torch
    from filelock import FileLock

    flags = level_flags(levels()[0])
    compiler = find_compiler()
    key = _hash(source_hash(), torch.__version__, _identity(compiler), flags)[:20]
    names = [folder / f"cpu-{key}" / "diffkern_cpu.so" for folder in cache_folders()]
    for library in names:
        with contextlib.suppress(OSError):
            _check_private(library.parent.parent)
            if _intact(library):
                return library
    if os.environ.get("DIFFKERN_NO_BUILD", "0") not in ("", "0"):
        raise BuildError("it is not built, and DIFFKERN_NO_BUILD forbids building it")
    unwritable = []
    for library in names:
        try:
            library.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(library.parent.parent)
            with FileLock(library.parent.with_suffix(".lock")):
                if not _intact(library):  # else another process built it while this one waited
                    _build_into(library, compiler, flags)
            return library
        except OSError as error:
            unwritable.append(str(error))
    raise BuildError("it is not built and no cache can be written: " + "; ".join(unwritable))


def _build_into(library: Path, compiler: str, flags: str) -> None:
    """Build beside the final place and move there in one step, so that no process ever sees half a library."""
    place = library.parent
    print(f"diffkern: building the cpu library, once (about {_SECONDS} s) ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="building-") as work:
        made = Path(work, place.name)
        made.mkdir()
        build(made / library.name, compiler, flags, log=place.with_suffix(".log"))
        shutil.rmtree(place, ignore_errors=True)  # a broken one
        made.rename(place)
    print(f"diffkern: built in {time.monotonic() - start:.0f} s: {library}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ the build


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++ in PATH. Raises BuildError if there is none."""
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if found is None:
        raise BuildError(f"there is no compiler CXX={named}" if named else "there is no C++ compiler (g++, clang++)")
    return found


def _identity(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the compiler {compiler} does not run: {error}") from error


def level_flags(level: str) -> str:
    """The compiler's flags for a library of one instruction-set level."""
    return f"{_FLAGS} {_LEVEL_FLAGS[level]}"


def build(library: Path, compiler: str, flags: str, log: Path) -> None:
    """Compile and link the library, and write its record. Raises BuildError with the first error and the log's path."""
    import torch

    root = Path(torch.__file__).parent
    objects, rules = [], []
    for source in _source_files():
        if source.suffix == ".cpp":
            objects.append(f"{source.stem}.o")
            rules.append(f"build {objects[-1]}: compile {_escape(source)}")
    lines = [
        f"compile = {compiler} {flags} -isystem {_escape(root / 'include')}",
        "rule compile",
        "  command = $compile -c $in -o $out",
        "rule link",
        f"  command = {compiler} -shared -o $out $in -L{_escape(root / 'lib')} -ltorch_cpu",
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
        shutil.copyfile(Path(work, library.name), library)
    write_record(library)


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

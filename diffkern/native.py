"""Finds, else builds, and loads the native libraries. Nothing happens before the first use of one.

A library is taken from the wheel if it was built ahead of time, else from the cache, else it is built into the cache:
`$DIFFKERN_CACHE`, or `$XDG_CACHE_HOME/diffkern`, or `~/.cache/diffkern`, or a folder in the temporary directory. What
is in the cache is named for everything that it depends on (sources, torch, compiler, flags), never known by its age,
and is loaded only if its sha256 is the one recorded when it was built. A cache is made for its owner alone (0700); one
that another user could have written to is refused, and said so. DIFFKERN_NO_BUILD=1 forbids building. What a library is
made of, and how: toolchain.py.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from diffkern import toolchain
from diffkern.toolchain import BuildError, Recipe

LIBRARIES = ("cpu", "cuda")

_PACKAGE = Path(__file__).resolve().parent
_reasons: dict[str, str | None] = {}
_lock = threading.RLock()


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
    if os.name != "posix":
        return f"the {library} library is not built on {platform.system()}"
    import torch

    if library == "cuda" and (reason := _no_gpu()) is not None:
        return reason
    try:
        path = _ahead_of_time(library) or _cached_or_built(_recipe(library))
        torch.ops.load_library(str(path))
        if library == "cpu":
            os.register_at_fork(after_in_child=_one_thread)
    except (OSError, RuntimeError) as error:  # torch raises either for a library that does not load
        return f"the {library} library: {error}"
    return None


def _one_thread() -> None:
    """In the child of a fork OpenMP waits for threads that stayed behind, for ever: there PyTorch is left with one, as
    it leaves its own DataLoader's."""
    import torch

    torch.set_num_threads(1)


def _no_gpu() -> str | None:
    """The reason why no kernel of the cuda library could run here, or None."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no GPU" if torch.version.hip is None else "this torch is built for AMD's GPUs"
    for i in range(torch.cuda.device_count()):
        if (found := torch.cuda.get_device_capability(i)) < toolchain.OLDEST_GPU:
            name = torch.cuda.get_device_name(i)
            return f"cuda:{i} ({name}) has compute capability {found[0]}.{found[1]}, the kernels need 8.0"
    return None


def _recipe(library: str) -> Recipe:
    """How to build a library for this machine. Raises BuildError if its compiler is not here."""
    if library == "cpu":
        return toolchain.cpu_recipe(toolchain.levels()[0])
    import torch

    return toolchain.cuda_recipe(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def _ahead_of_time(library: str) -> Path | None:
    if library != "cpu":
        return None  # a wheel cannot know the GPU
    found = (toolchain.ahead_of_time_path(_PACKAGE, level) for level in toolchain.levels())
    return next((path for path in found if toolchain.intact(path, library)), None)


# ------------------------------------------------------------------------------------------------------------ the cache


def cache_folders() -> list[Path]:
    """Where built libraries are looked for, in order; the last one is private to the user but not kept for ever."""
    chosen = os.environ.get("DIFFKERN_CACHE")
    if not chosen:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        chosen = os.path.join(base, "diffkern")
    return [Path(chosen), Path(tempfile.gettempdir()) / f"diffkern-{os.getuid()}"]


def _check_private(folder: Path, library: Path) -> None:
    """Raise PermissionError if another user could put a library into the cache for us to run, or has put this one."""
    if folder.stat().st_mode & 0o022:
        raise PermissionError(f"others can write to the cache {folder}: make it private (chmod go-w) or remove it")
    for path in (folder, library.parent, library, toolchain.record_of(library)):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_uid not in (os.getuid(), 0):
                raise PermissionError(f"the cache {folder} is not used: {path} belongs to another user")


def _cached_or_built(recipe: Recipe) -> Path:
    import torch
    from filelock import FileLock

    made_of = (toolchain.source_hash(recipe.name), torch.__version__, recipe.identity, recipe.compile)
    entry = f"{recipe.name}-{toolchain.hash_of(*made_of)[:20]}"
    names = [folder / entry / f"diffkern_{recipe.name}.so" for folder in cache_folders()]
    for library in names:
        with contextlib.suppress(OSError):
            _check_private(library.parent.parent, library)
            if toolchain.intact(library, recipe.name):
                return library
    if os.environ.get("DIFFKERN_NO_BUILD", "0") not in ("", "0"):
        raise BuildError("it is not built, and DIFFKERN_NO_BUILD forbids building it")
    unwritable: list[str] = []
    for library in names:
        if unwritable:
            print(f"diffkern: {unwritable[-1]}; trying {library.parent.parent}", file=sys.stderr, flush=True)
        try:
            library.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(library.parent.parent, library)
            with FileLock(library.parent.with_suffix(".lock")):
                if not toolchain.intact(library, recipe.name):  # else another process built it while this one waited
                    _build_into(library, recipe)
            return library
        except OSError as error:
            unwritable.append(str(error))
    raise BuildError("it is not built and no cache can be written: " + "; ".join(unwritable))


def _build_into(library: Path, recipe: Recipe) -> None:
    """Build beside the final place and move there in one step, so that no process ever sees half a library."""
    place, name = library.parent, recipe.name
    print(f"diffkern: building the {name} library, once (about {recipe.seconds} s) ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    beside = f"building-{place.name}-"
    for left in place.parent.glob(f"{beside}*"):  # by a process that was killed: this one has the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=beside) as work:
        made = Path(work, place.name)
        made.mkdir()
        toolchain.build(made / library.name, recipe, log=place.with_suffix(".log"))
        if not toolchain.intact(made / library.name, recipe.name):
            raise OSError(f"the disk of the cache {place.parent} does not give back what was written to it")
        shutil.rmtree(place, ignore_errors=True)  # a broken one
        made.rename(place)
    print(f"diffkern: built in {time.monotonic() - start:.0f} s: {library}", file=sys.stderr, flush=True)

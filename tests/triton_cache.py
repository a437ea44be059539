"""Compiles the Triton kernels that the tests launch on an H200 where there is none, so that time on one goes to tests.

    python tests/triton_cache.py fill DIR [-n PROCESSES] [PYTEST ARGUMENT ...]   compiles into DIR, packs DIR.tar.xz
    python tests/triton_cache.py unpack FILE DIR                                 there: what was packed, ready in DIR

`benchmarks/gpu_run.sh --kernels DIR.tar.xz` unpacks it for all that it runs. The tests ask for the kernels (see
fake_gpu.py) by Triton's own launch, so that an entry has the name by which a launch looks for it. That is a hash of
what `facts` says, of the kernel and of its options: an entry is found only by the same build of Triton (its wheel for
another Python is another one), with the same ptxas and the same of a few variables. Where the folder is, PyTorch and
the driver are no part of it. What is not found is compiled there, as ever.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime.cache import triton_key

TESTS = Path(__file__).resolve().parent
FACTS = "facts.json"
ARCH = 90  # fake_gpu.py's


def facts() -> dict[str, str]:
    """What the names of all entries depend on, beside the kernels."""
    variables = {name: os.environ[name] for name in ("TRITON_OVERRIDE_ARCH", "PTXAS_OPTIONS") if name in os.environ}
    return {
        "Triton": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(ARCH).strip().splitlines()[-1],
        "variables": str(sorted((get_cache_invalidating_env_vars() | variables).items())),
    }


def files() -> list[str]:
    """The test files that gpu_run.sh runs."""
    return [str(p) for p in sorted(TESTS.glob("test_*.py")) if re.search(r"mark\.(gpu|device)", p.read_text())]


def fill(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Run the tests for what they launch. Returns the seconds that Triton took for each entry: none for one that was
    there. Whether a test passes says nothing: its tensors have no numbers."""
    with tempfile.TemporaryDirectory() as scratch:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "PYTEST_PLUGINS": "fake_gpu",
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "DIFFKERN_COMPILED": scratch,
            "TRITON_CACHE_DIR": str(folder.resolve()),
            "TRITON_STORE_BINARY_ONLY": "1",
        }
        # Inductor's own kernels are not for this: it has a cache of its own, and wants to know the driver.
        chosen = ["-m", "gpu or device", "-k", "not inductor", *(arguments or files())]
        run = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *chosen]
        code = subprocess.run(run, cwd=TESTS.parent, env=env, check=False, stdout=sys.stderr).returncode
        if code not in (0, 1):  # all passed, or some failed
            raise SystemExit(f"the tests were not all run: pytest ended with {code}")
        found: dict[str, float] = {}
        for path in Path(scratch).glob("*.json"):
            for name, seconds in json.loads(path.read_text()).items():
                found[name] = found.get(name, 0.0) + seconds
    (folder / FACTS).write_text(json.dumps(facts()))
    return found


def pack(folder: Path) -> Path:
    """The folder in one file, without what a launch does not read."""
    packed = folder.with_name(folder.name + ".tar.xz")
    with tarfile.open(packed, "w:xz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in (".cubin", ".json"):
                tar.add(path, path.relative_to(folder))
    return packed


def unpack(packed: Path, folder: Path) -> list[str]:
    """Returns which of the facts are others here, in which case nothing is found."""
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    for group in folder.glob("*/__grp__*.json"):  # which names the files of an entry by where they were
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent.resolve() / name) for name in names}}))
    there, here = json.loads((folder / FACTS).read_text()), facts()
    return [f"{name}: {there.get(name)}, here {here[name]}" for name in here if here[name] != there.get(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fill")
    one.add_argument("folder", type=Path)
    other = commands.add_parser("unpack")
    other.add_argument("packed", type=Path)
    other.add_argument("folder", type=Path)
    options, arguments = parser.parse_known_args()
    if options.command == "unpack":
        if not (options.packed.is_file() and tarfile.is_tarfile(options.packed)):
            parser.error(f"{options.packed} is no file that `fill` has packed")
        wrong = unpack(options.packed, options.folder)
        print("\n".join([f"{options.packed} is of no use here:", *wrong]) if wrong else f"unpacked {options.packed}")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    found = fill(options.folder, arguments)
    new = [seconds for seconds in found.values() if seconds]
    print(json.dumps({"entries": len(found), "compiled": len(new), "seconds": round(sum(new), 1)}))
    packed = pack(options.folder)
    print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()

"""csrc/cuda compiles with nvcc for GPUs that are not here, into machine code that is as good as it was meant to be, and
the library loads where there is no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from diffkern import toolchain

READ = ("sm_80", "sm_90a")  # whose machine code is read
# For the others it only has to compile: from the code of an older one, since parsing takes longer than all the rest.
ALSO = {"compute_80": ("sm_86", "sm_89"), "compute_90": ("sm_100", "sm_120")}
REGISTERS, SHARED = 128, 48 * 1024
TENSOR_CORES = {"attention": 255}  # registers: products wait for the tensor cores, not for other programs
NO_TENSOR_READ = {"randn", "pool_moments"}
NO_TENSOR_WRITTEN = {"group_moments", "pool_moments"}
# Instructions of a turn of the loop, over the eight normals that a thread makes in it: torch's noise alone takes 129.
READS_AFTER = 180  # instructions, a group norm
PER_PRODUCT = 10  # instructions of the loop for a product of tiles, the softmax of its scores among them
PER_NORMAL = {"randn<Half, true>": 21, "randn<BFloat16, true>": 21, "randn<float, true>": 21}

try:
    toolchain.find_nvcc(), toolchain.find_compiler()
except toolchain.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what is built once a run, also when that is spread over processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    """The library for all architectures, with what ptxas says of it in its log."""
    library = folder / "diffkern_cuda.so"
    with FileLock(folder / "diffkern_cuda.lock"):
        if not library.exists():
            recipe = toolchain.cuda_recipe([(8, 0), (9, 0)])
            also = " ".join(f"-gencode 'arch={code},code=[{','.join(archs)}]'" for code, archs in ALSO.items())
            recipe = recipe._replace(compile=f"{recipe.compile} {also} -Xptxas -v")
            toolchain.build(library, recipe, library.with_suffix(".log"))
    return library


def kernels(log: str) -> list[dict[str, Any]]:
    """What ptxas said of every kernel and architecture: registers, stack, spills and shared memory, in bytes."""
    found = []
    for part in re.split(r"ptxas info\s*: Compiling entry function ", log)[1:]:
        name, arch = re.match(r"'(\w+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        numbers = {
            "registers": r"Used (\d+) registers",
            "stack": r"(\d+) bytes stack frame",
            "stores": r"(\d+) bytes spill stores",
            "loads": r"(\d+) bytes spill loads",
            "shared": r"(\d+) bytes smem",
        }
        matches = {key: re.search(pattern, part) for key, pattern in numbers.items()}
        found.append({"name": name, "arch": arch, **{key: int(m[1]) if m else 0 for key, m in matches.items()}})
    return found


@pytest.fixture(scope="module")
def compiled(library: Path) -> list[dict[str, Any]]:
    """The kernels of the library, each with its `title` in C++ and, for what is read, its opcodes in `code` and the
    number of those in its longest loop in `loop`."""
    listing = machine_code(library)
    found = kernels(library.with_suffix(".log").read_text())
    titles = readable([k["name"] for k in found])
    for k, title in zip(found, titles, strict=True):
        k["code"], k["loop"] = listing.get((k["name"], k["arch"]), (None, 0))
        k["title"] = title
    return found


def readable(names: list[str]) -> list[str]:
    """C++ names without namespace and parameters: randn<float, true>."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    titles = [re.sub(r"\(anonymous namespace\)|diffkern|::", "", line) for line in done.splitlines()]
    return [re.sub(r"^void |\(.*", "", title) for title in titles]


def machine_code(library: Path) -> dict[tuple[str, str], tuple[list[str], int]]:
    """The opcodes of every kernel and how many are in its longest loop, by its name and architecture."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is in the CUDA toolkit and in Triton")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    listing: list[tuple[str, str]] = []  # the lines, each with the architecture asked for: CUDA 12.8 calls sm_90a sm_90
    for arch in READ:
        done = subprocess.run([tool, "-sass", "-arch", arch, library], capture_output=True, text=True, check=True)
        listing += [(arch, line) for line in done.stdout.splitlines()]
    found: dict[tuple[str, str], list[str]] = {}
    loops: dict[tuple[str, str], int] = {}
    key = ("", "")
    for arch, line in listing:
        if m := re.search(r"Function : (\w+)", line):
            key = (m[1], arch)
            found[key], loops[key] = [], 0
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*) *(0x[0-9a-f]+)?", line):
            found[key].append(m[2])
            if m[2] == "BRA" and m[3]:  # an instruction is 16 bytes
                back = int(m[1], 16) - int(m[3], 16)
                loops[key] = max(loops[key], back // 16 + 1 if back > 0 else 0)
    for code in found.values():
        while code and code[-1] in ("NOP", "BRA"):  # padding behind the end
            code.pop()
    return {key: (code, loops[key]) for key, code in found.items()}


def failures(compiled: list[dict[str, Any]], wrong: Callable[[dict[str, Any]], str]) -> list[str]:
    """What is wrong with the kernels whose machine code is read."""
    read = [k for k in compiled if k["arch"] in READ]
    assert read
    return [f"{k['title']}, {k['arch']}: {w}" for k in read if (w := wrong(k))]


def test_every_kernel_stays_in_registers_and_in_float32(compiled):
    def wrong(k: dict[str, Any]) -> str:
        registers = TENSOR_CORES.get(k["title"].split("<")[0], REGISTERS)
        said = [f"{k[key]} {key}" for key, limit in (("registers", registers), ("shared", SHARED)) if k[key] > limit]
        said += [op for op in k["code"] if re.match(r"(LDL|STL)\b|D(ADD|MUL|FMA|SETP|MNMX)\b|\w+.*\.F64", op)]
        return ", ".join(said[:5])

    assert not failures(compiled, wrong)
    assert not [k for k in compiled if k["stack"] or k["stores"] or k["loads"]]


def test_every_kernel_has_a_form_that_moves_sixteen_bytes_at_a_time(compiled):
    wide: dict[str, bool] = {}
    for k in (k for k in compiled if k["arch"] in READ):
        reads = any(re.match(r"LDG(STS)?\.E\b.*\.128\b", op) for op in k["code"])
        writes = any(re.match(r"STG\.E\b.*\.128\b", op) for op in k["code"])
        name = k["title"].split("<")[0]
        form = f"{name} {re.findall(r'float|Half|BFloat16', k['title'])} {k['arch']}"
        wide[form] = wide.get(form, False) or (
            (reads or name in NO_TENSOR_READ) and (writes or name in NO_TENSOR_WRITTEN)
        )
    assert not [form for form, is_wide in wide.items() if not is_wide]


def test_products_are_those_of_the_tensor_cores(compiled):
    """In 16 bits with sums in float32, out of shared memory by fragments, which copies fill that are not waited for."""
    wanted = {
        "HMMA": r"HMMA\.16816\.F32(\.BF16)?$",
        "LDSM of keys": r"LDSM\.16\.M88\.4$",
        "LDSM of values": r"LDSM\.16\.MT88\.4$",
        "LDGSTS": r"LDGSTS\.E\.BYPASS\.128$",
    }

    def wrong(k: dict[str, Any]) -> str:
        if k["title"].split("<")[0] not in TENSOR_CORES:
            return ""
        missing = [name for name, pattern in wanted.items() if not any(re.match(pattern, op) for op in k["code"])]
        products = sum(op.startswith("HMMA") for op in k["code"]) // 2  # the loop's, without those of the last keys
        if k["loop"] > PER_PRODUCT * products:
            missing.append(f"{k['loop'] / products:.1f} instructions a product")
        return ", ".join(missing)

    assert not failures(compiled, wrong)
    assert {k["title"].split("<")[0] for k in compiled} >= TENSOR_CORES.keys()


def test_blocks_of_a_cluster_send_without_a_fence(compiled):
    """Which would wait for all that the block has asked of memory."""
    kernels = [k for k in compiled if k["title"].startswith("one_pass") and k["arch"] == "sm_90a"]
    assert len(kernels) == 9
    for k in kernels:
        assert any(op.startswith("STAS") for op in k["code"]), k["title"]
        assert not any(op.startswith("MEMBAR") for op in k["code"]), k["title"]


def test_a_group_norm_asks_for_its_input_before_it_reckons_anything_else(compiled):
    """A division takes some 20 instructions that wait for each other: with six of them the first read was the 240th."""

    def wrong(k: dict[str, Any]) -> str:
        if not re.match(r"(one_pass|group_moments|normalise)<\w+, [48]\b", k["title"]):
            return ""
        first = next(i for i, op in enumerate(k["code"]) if op.startswith("LDG.E.128"))
        return f"reads after {first} instructions" if first > READS_AFTER else ""

    assert not failures(compiled, wrong)


def test_a_normal_costs_few_instructions(compiled):
    def wrong(k: dict[str, Any]) -> str:
        limit = PER_NORMAL.get(k["title"])
        cost = k["loop"] / 8
        return f"{cost:.1f} a normal" if limit is not None and not 8 < cost <= limit else ""

    assert not failures(compiled, wrong)
    assert PER_NORMAL.keys() <= {k["title"] for k in compiled}


def test_every_architecture_gets_every_kernel(compiled):
    names = {k["name"] for k in compiled}
    for arch in (*READ, *ALSO["compute_80"], *ALSO["compute_90"]):
        assert {k["name"] for k in compiled if k["arch"] == arch} == names, arch


LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.diffkern_CUDA.randn(torch.zeros(1, 2, dtype=torch.int64), [8], 0, torch.float32, 0)
except NotImplementedError as error:
    print(error)
"""


def test_the_library_loads_without_a_gpu(library):
    """It is linked against no CUDA library, and says that it has nothing for the CPU."""
    done = subprocess.run([sys.executable, "-c", LOAD, library], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'CPU' backend" in done.stdout
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert not re.search(r"NEEDED.*(cudart|libcuda|torch_cuda|c10_cuda)", needed)


def test_flags_are_for_the_gpus_that_are_there():
    known = {75, 80, 86, 89, 90, 100, 120}
    flags = {
        ((8, 0),): "arch=compute_80,code=sm_80",
        ((9, 0), (9, 0)): "arch=compute_90a,code=sm_90a",
        ((12, 1),): "arch=compute_120,code=compute_120",
        ((10, 3),): "arch=compute_100,code=compute_100",
    }
    for capabilities, expected in flags.items():
        assert toolchain.gencode(capabilities, known) == f"-gencode {expected}"
    assert toolchain.gencode([(9, 0), (8, 6)], known).count("-gencode") == 2
    with pytest.raises(toolchain.BuildError, match=r"compute capability 7\.0"):
        toolchain.gencode([(7, 0)], known)

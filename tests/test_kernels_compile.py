"""Every Triton kernel compiles for GPUs that are not here, into machine code that is as good as it was meant to be."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffkern.kernels
import pytest
from diffkern.kernels import configs
from filelock import FileLock

pytest.importorskip("triton")

ARCHS = ("90", "80", "100")  # the first gets every variant, the others one of each kernel
REGISTERS, REGISTERS_ODD = 128, 168  # of the workloads, and of odd shapes: 65536 a multiprocessor
SHARED = 48 * 1024
# Products wait for the tensor cores, not for other programs: all registers, and what sm_86 has of shared memory.
REGISTERS_ALL, SHARED_ALL = 255, 99 * 1024
TENSOR_CORES = {"_attention", "_attention_to_few", "_conv2d", "_linear"}
ATTENTION = {"_attention", "_attention_to_few"}
BY_TABLE = {*ATTENTION, "_conv2d", "_linear"}  # their shapes are by architecture: all shared memory that it has
# All instructions of the program, over the normals that a thread makes: torch's Triton noise alone takes 129 a normal.
PER_NORMAL = {"_randn": 33, "_add_noise": 38, "_reparameterize": 43}
READS_NO_TENSOR = {"_randn", "_timestep_embedding", "_fold", "_pool"}  # the last two: a few numbers a sample
WRITES_NO_TENSOR = {"_moments", "_terms", "_fold", "_pool"}
THREE_RESULTS = "CIFAR UNet out"  # a pixel of which is 6 or 12 bytes


def launched() -> set[str]:
    """The kernels that launchers in kernels/ start: every `name[grid](...)`."""
    names = set()
    for path in Path(diffkern.kernels.__path__[0]).glob("*.py"):
        if path.name == "launch.py":  # which starts whatever it is given
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert isinstance(node.func.value, ast.Name)
                names.add(node.func.value.id)
    return names


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What compile_kernels.py says of every kernel: once a run, also when it is spread over processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    answer = folder / "kernels.json"
    with FileLock(folder / "kernels.lock"):
        if not answer.exists():
            env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            env["TRITON_CACHE_DIR"] = str(folder / "triton")
            script = Path(__file__).with_name("compile_kernels.py")
            run = subprocess.run(
                [sys.executable, str(script), *ARCHS],
                env=env,
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stderr[-4000:]
            answer.write_text(run.stdout.splitlines()[-1])
    return json.loads(answer.read_text())


def failures(compiled: list[dict[str, Any]], kernel: str, wrong: Any) -> list[str]:
    variants = [v for v in compiled if v["kernel"] == kernel]
    assert variants, f"no sample of an op launches {kernel}"
    return [f"{v['label']}: {w}" for v in variants if (w := wrong(v))]


@pytest.mark.parametrize("kernel", sorted(launched()))
def test_kernel_stays_in_registers_and_in_float32(compiled, kernel):
    def wrong(v: dict[str, Any]) -> str:
        limit = REGISTERS if v["workload"] else REGISTERS_ODD
        limit = REGISTERS_ALL if kernel in TENSOR_CORES else limit
        found = []
        if v["stack"] or v["local"] or v["spills"] or v["scratch"]:
            found.append(f"stack {v['stack']}, local {v['local']}, scratch {v['scratch']}, {v['spills'][:3]}")
        if v["doubles"]:
            found.append(f"float64: {v['doubles'][:3]}")
        if v["reg"] > limit or v["reg"] * v["threads"] > 65536:
            found.append(f"{v['reg']} registers, the limit is {limit}")
        limit = SHARED_ALL if kernel in TENSOR_CORES else SHARED
        if v["shared"] > (configs.shared_memory(v["arch"]) if kernel in BY_TABLE else limit):
            found.append(f"{v['shared']} bytes of shared memory")
        return "; ".join(found)

    assert not failures(compiled, kernel, wrong)


@pytest.mark.parametrize("kernel", sorted(launched()))
def test_workloads_read_and_write_sixteen_bytes_at_a_time(compiled, kernel):
    def wrong(v: dict[str, Any]) -> str:
        reads = v["wide_loads"] or v["tma"] or kernel in READS_NO_TENSOR
        writes = v["wide_stores"] or kernel in WRITES_NO_TENSOR or THREE_RESULTS in v["label"]
        return "" if not v["workload"] or (reads and writes) else "narrow loads or stores"

    assert not failures(compiled, kernel, wrong)


@pytest.mark.parametrize("kernel", sorted(ATTENTION))
def test_products_of_64_rows_are_made_by_a_group_of_warps(compiled, kernel):
    def wrong(v: dict[str, Any]) -> str:
        meant = v["arch"] == 90 and v["constexprs"]["QUERIES"] >= 64 and "float32" not in v["label"]
        return "no wgmma" if meant and not v["wgmma"] else ""

    assert not failures(compiled, kernel, wrong)


@pytest.mark.parametrize("kernel", sorted(PER_NORMAL))
def test_a_normal_costs_few_instructions(compiled, kernel):
    def wrong(v: dict[str, Any]) -> str:
        tile = v["constexprs"].get("TILE") or v["constexprs"]["ROWS"] * v["constexprs"]["COLUMNS"]
        cost = v["instructions"] / (tile / v["threads"])
        return f"{cost:.1f} a normal" if v["workload"] and cost > PER_NORMAL[kernel] else ""

    assert not failures(compiled, kernel, wrong)


def test_every_architecture_gets_every_kernel(compiled):
    for arch in ARCHS:
        missing = launched() - {v["kernel"] for v in compiled if v["label"].endswith(f"sm_{arch}")}
        assert missing == ({"_conv2d"} if arch == "80" else set())  # which has no tensor memory accelerator


def test_our_convolution_is_compiled_with_moments_too(compiled):
    """So that what is asked above of every form is asked of this one."""
    found = [v["arch"] for v in compiled if v["kernel"] == "_conv2d" and v["constexprs"]["RUN"]]
    assert set(found) == {90, 100}


@pytest.mark.parametrize("kernel", ["_conv2d", "_linear"])
def test_products_of_hopper_take_its_tensor_cores(compiled, kernel):
    def wrong(v: dict[str, Any]) -> str:
        return "no wgmma" if v["label"].endswith("sm_90") and not v["wgmma"] else ""

    assert not failures(compiled, kernel, wrong)

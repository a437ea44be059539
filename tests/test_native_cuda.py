"""The loader of the CUDA library: for which GPUs it is built, by which nvcc, and what is said where it cannot be."""

from __future__ import annotations

import pytest
import torch
from builds import fresh

from diffkern import toolchain

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake nvcc 13.0"; exit 0; fi
if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_90; exit 0; fi
echo "$*" >> {flags}
exec "{compiler}" "$@"
"""


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as torch reports them: their names and compute capabilities, to be changed."""
    found = [("NVIDIA H200", (9, 0)), ("NVIDIA A100", (8, 0))]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: found[i][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i][1])
    return found


@pytest.fixture
def nvcc(tmp_path, compiler, monkeypatch):
    """A script that is called like nvcc. Returns the file of the flags that it was given."""
    path, flags = tmp_path / "fake-nvcc", tmp_path / "flags"
    path.write_text(NVCC.format(flags=flags, compiler=compiler.path))
    path.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(path))
    return flags


def test_cuda_is_built_for_the_gpus_that_are_there(home, loaded, compiler, nvcc, gpus, capsys):
    assert fresh().why_not("cuda") is None
    assert fresh().why_not("cuda") is None
    assert compiler.builds == 1
    assert loaded[0].is_relative_to(home)
    assert loaded[0].name == "diffkern_cuda.so"
    assert "building the cuda library, once (about" in capsys.readouterr().err
    *compiles, link = nvcc.read_text().splitlines()
    for line in compiles:
        assert "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a" in line
        assert f"-ccbin {compiler.path}" in line
        assert ".cu -o" in line
    assert "-cudart static" in link
    assert "-ltorch_cpu" in link
    gpus.pop()
    assert fresh().why_not("cuda") is None
    assert (compiler.builds, loaded[2] != loaded[0]) == (2, True), "for other GPUs another library"


def test_without_a_gpu_nothing_is_built(home, loaded, compiler, nvcc, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fresh().why_not("cuda") == "there is no GPU"
    gpus[1] = ("Tesla T4", (7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "cuda:1 (Tesla T4) has compute capability 7.5" in fresh().why_not("cuda")
    assert (compiler.builds, loaded) == (0, [])


def test_without_nvcc_the_reason_says_what_serves(home, loaded, compiler, gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    assert "no-such-nvcc" in fresh().why_not("cuda")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain, "DEFAULT_NVCC", str(tmp_path / "nvcc"))
    assert "there is no nvcc (" in (reason := fresh().why_not("cuda"))
    assert "Triton's kernels serve instead" in reason
    assert not loaded


def test_nvcc_is_found_where_users_expect(tmp_path, monkeypatch):
    def place(*folders: str) -> str:
        path = tmp_path.joinpath(*folders, "nvcc")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh")
        path.chmod(0o755)
        return str(path)

    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    for variable, value, expected in (
        ("DEFAULT_NVCC", default := place("default"), default),
        ("PATH", str(tmp_path / "path"), place("path")),
        ("CUDA_PATH", str(tmp_path / "other"), place("other", "bin")),
        ("CUDA_HOME", str(tmp_path / "home"), place("home", "bin")),
        ("CUDACXX", named := place("named"), named),
    ):  # each is preferred to the one before it
        if variable == "DEFAULT_NVCC":
            monkeypatch.setattr(toolchain, variable, value)
        else:
            monkeypatch.setenv(variable, value)
        assert toolchain.find_nvcc() == expected

"""Kernels that were compiled without a GPU are found by the launches of another process, from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU"),
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows of no GPU"),
]
SCRIPT = Path(__file__).with_name("triton_cache.py")


def chosen(ops: str) -> tuple[str, ...]:
    return "tests/test_ops.py", "-k", f"({ops}) and float16"  # of 16 bits, for bfloat16 is among them


def called(*arguments: object, **variables: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and "XDIST" not in k}
    run = [sys.executable, "-P", str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(run, env=env | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_was_compiled_is_found_elsewhere(tmp_path):
    """Also by a process that launches another kernel first, which calls the same functions."""
    first = json.loads(called("fill", tmp_path / "a", *chosen("add_noise")))
    assert first["compiled"] == first["entries"] > 10
    assert called("unpack", tmp_path / "a.tar.xz", tmp_path / "b").startswith("unpacked")
    again = json.loads(called("fill", tmp_path / "b", *chosen("randn or add_noise")))
    assert again["compiled"] > 0
    assert again["entries"] - again["compiled"] == first["entries"]
    entries = sum(path.is_dir() for path in (tmp_path / "b").iterdir())
    assert entries == again["entries"], "an entry that no launch looked for"
    other = called("unpack", tmp_path / "a.tar.xz", tmp_path / "c", DISABLE_PTXAS_OPT="1")
    assert "is of no use here" in other
    assert other.count("DISABLE_PTXAS_OPT") == 1, "what is the same is not named"

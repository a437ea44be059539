"""`import diffkern` is quick and does nothing: no CUDA, no Triton, no compiler, no library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffkern

WATCH = """
import json, sys, time
import torch
before = set(sys.modules)
events = []
sys.addaudithook(lambda name, args: events.append(name))
start = time.process_time()  # of the processor: the suite runs several tests at a time
import diffkern
seconds = time.process_time() - start
modules = sorted(set(sys.modules) - before)
diffkern.load("emoji-32")
loaded = sorted(set(sys.modules) - before)
for name in diffkern.__all__:
    getattr(diffkern, name)
assert diffkern.integrations.diffusers.FUSED
print(json.dumps({
    "seconds": seconds,
    "modules": modules,
    "loading": loaded,
    "spawned": [e for e in events if e in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")],
    "written": [e for e in events if e in ("os.mkdir", "os.rename", "os.remove")],
    "libraries": sorted(torch.ops.loaded_libraries),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_does_no_work():
    root = str(Path(diffkern.__file__).parent.parent)

    done = subprocess.run(
        [sys.executable, "-c", WATCH],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr, done.stderr
    seen = json.loads(done.stdout)
    assert seen["seconds"] < 0.3
    assert not [m for m in seen["modules"] if m.split(".")[0] in ("triton", "diffusers", "matplotlib", "ninja")]
    assert not [
        m
        for m in seen["modules"]
        if m.startswith(("diffkern.kernels", "diffkern.integrations", "torch.utils.cpp_extension"))
    ]
    assert seen["spawned"] == seen["written"] == seen["libraries"] == []
    assert seen["cuda"] is False
    # torch's compiler takes longer to import than a picture to draw
    assert not [m for m in seen["loading"] if m.startswith(("torch._dynamo", "torch._inductor", "sympy"))]

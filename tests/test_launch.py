"""A kernel that is launched again is the one that Triton would launch, and little is done on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# Python functions that a call of an op may run, from the op to Triton's launch and back: the present numbers and a few.
FUNCTIONS = {"attention": 102, "conv2d_moments": 90, "layer_norm_modulate_backward": 86}
MOST = 80  # of the others


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_what_is_remembered_is_what_triton_launches():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compare_launches.py")
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    ops = json.loads(run.stdout)
    assert {"group_norm_silu", "attention", "conv2d", "linear", "sampler_step"} <= ops.keys()
    assert ops["randn"]["draws"] == [0, 0, 1, 1, 1]
    for name, found in ops.items():
        if name != "query_key_value":  # PyTorch's product and nothing else
            assert found["found"] >= found["launches"] / 2 > 0, f"{name}: a second launch was not remembered"
            assert found["forms"] > 2, f"{name}: its samples ask for no two forms of a kernel"
        assert found["functions"] <= FUNCTIONS.get(name, MOST), f"{name}: {found['functions']} Python functions a call"

"""Datasets by several processes: under torchrun, which starts all again when one dies, and where one at a time is
killed and comes back while the others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from folders import CONFIG, SCHEDULER, write_tiny

from diffkern.models.unet import UNet2D

ROOT = Path(__file__).parent.parent

# A process of a job that has a process group of its own. The second kills itself, once, in the middle of a shard.
RANK = """
import os, signal, sys
import torch.distributed as dist
from diffkern import cli
from diffkern.models.unet import UNet2D
dist.init_process_group("gloo")
if dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    forward, calls = UNet2D.forward, []
    def dying(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args, **kwargs)
    UNet2D.forward = dying
sys.exit(cli.main(sys.argv[1:]))
"""


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (".lock", "manifest.json")}


def test_torchrun_restarts_a_job_and_its_bytes_are_those_of_one_process(tmp_path):
    config = CONFIG.__class__(**{**CONFIG.__dict__, "num_class_embeds": None})
    torch.manual_seed(0)
    UNet2D(config).save(tmp_path / "tiny", torch.float32)
    (tmp_path / "tiny/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (tmp_path / "rank.py").write_text(RANK)
    command = ["sample", "--model", tmp_path / "tiny", "--steps", 2, "-n", 30, "--shard-size", 4, "--batch-size", 2,
               "--format", "npz", "--device", "cpu", "--out"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words):
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1, "--monitor-interval", 0.1]
    said = run(*torchrun, "--standalone", tmp_path / "rank.py", *command, tmp_path / "two")
    assert "by 2 processes" in said
    assert said.count("30 pictures in 8 shards, checked") == 1
    assert "were there before" in said, "what was made before the kill is kept"
    run("-m", "diffkern", *command, tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 16
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_kills_at_random_moments_lose_nothing(tmp_path):
    write_tiny(tmp_path)
    words = ["--kills", 4, "--processes", 1, 4, "--format", "png", "--model", tmp_path]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/kill_test.py"), *map(str, words)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 kills in ") == 2
    assert done.stdout.count("0 lost, 0 twice, all bytes equal") == 2

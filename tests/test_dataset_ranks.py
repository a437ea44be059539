"""Datasets by several processes: under torchrun on two hosts, which start all again when one dies, and where one at a
time is killed and comes back while the others go on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from folders import CONFIG, SCHEDULER, write_tiny
from sentences import expect_a_sentence

from diffkern import cli, options, ranks
from diffkern.dataset import job, manifest
from diffkern.likelihood.parts import Part, Parts
from diffkern.likelihood.record import Record
from diffkern.models.unet import UNet2D
from diffkern.ranks import Ranks, SaidByFirst

ROOT = Path(__file__).parent.parent

# A process of a job. In the first start the second one kills itself, once its first shard is almost done; the first one
# waits behind its own for torchrun to end it, or it would do the whole job alone before torchrun has seen anything.
RANK = """
import json, os, pathlib, signal, sys
from diffkern import cli
from diffkern.models.unet import UNet2D
died = pathlib.Path(__file__).with_name("died")
if not died.exists():
    forward, calls = UNet2D.forward, []
    def until_one_dies(self, *args, **kwargs):
        calls.append(args)
        if os.environ["RANK"] == "1" and len(calls) == 4:
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["RANK"] == "0" and len(calls) == 5:
            signal.pause()
        return forward(self, *args, **kwargs)
    UNet2D.forward = until_one_dies
sys.exit(next((code for command in json.loads(sys.argv[1]) if (code := cli.main(command))), 0))
"""


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (".lock", "manifest.json")}


@pytest.fixture(name="one_thread")
def compute_in_one_thread():
    """As each process of torchrun does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scores(path):
    """What must be equal, to the bit."""
    value = json.loads(path.read_text())
    assert value["complete"]
    return [{key: part for key, part in result.items() if key != "seconds"} for result in value["results"]]


def test_two_hosts_restart_a_job_and_its_bytes_are_those_of_one_process(tmp_path, one_thread):
    torch.manual_seed(0)
    UNet2D(replace(CONFIG, num_class_embeds=None)).save(tmp_path / "tiny", torch.float32)
    (tmp_path / "tiny/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (tmp_path / "rank.py").write_text(RANK)

    def commands(out):
        on = f"--model {tmp_path}/tiny --device cpu --batch-size 2 --out {tmp_path}/{out}"
        return [
            f"sample {on} --steps 2 -n 30 --shard-size 4 --format npz".split(),
            f"likelihood {on}.json --data noise -n 5 "
            "--method vlb --method ode --terms 3 --solver heun --steps 2".split(),
        ]

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = ("-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 1 --monitor-interval 0.1 "
                f"--rdzv-backend c10d --rdzv-endpoint localhost:{port}")  # fmt: skip
    hosts = [
        subprocess.Popen(
            [sys.executable, *torchrun.split(), str(tmp_path / "rank.py"), json.dumps(commands("two"))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    ended = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], ended
    said = "".join(out for out, _ in ended)
    assert said.count("30 pictures in 8 shards, checked") == 1
    assert "by 2 processes" in said
    assert "were there before" in said, "what was made before the kill is kept"
    assert said.count("bits/dim:") == 1, "the first process says it, the other nothing"
    assert [cli.main(command) for command in commands("one")] == [0, 0]
    assert len(contents(tmp_path / "one")) == 16
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert scores(tmp_path / "two.json") == scores(tmp_path / "one.json")


def test_the_processes_of_one_start_meet_and_no_others():
    """Torchrun's store holds what an earlier start left, and hosts differ in how often they say that they started."""
    store, met = dist.HashStore(), []

    def follow(pause=lambda: None):
        with ranks._together(store, 1, pause) as own:
            met.append((own.get("start"), own.add("counted", 1)))

    def start(name):
        early, late = threading.Thread(target=follow), threading.Thread(target=follow)
        early.start()
        time.sleep(0.2)
        assert early.is_alive(), "what the start before was named is no answer"
        with ranks._together(store, 0, lambda: None) as own:
            own.set("start", name)
            late.start()
            early.join(10)
            late.join(10)
            assert sorted(met) == [(name, 1), (name, 2)]
            met.clear()
            if name == b"first":
                raise InterruptedError

    with pytest.raises(InterruptedError):
        start(b"first")
    start(b"second")
    follow()
    assert met == [(b"second", 3)], "who comes when all is done waits for nobody"
    store = dist.HashStore()

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(stopped)


def test_a_process_that_is_not_like_the_first_is_refused(tmp_path):
    """As on a host with another checkpoint, or another disk."""

    def join(said, settings):
        store = dist.HashStore()
        store.set("opened", said)
        with job._opened(Ranks(store, 1, 2), tmp_path, settings, torch.device("cpu"), lambda: None):
            pass

    with pytest.raises(ValueError, match=r"manifest\.json, and it is not here: all hosts must share the folder"):
        join("", {"seed": 0})
    manifest.write(tmp_path, {"seed": 0}, torch.device("cpu"))
    join("", {"seed": 0})
    with pytest.raises(ValueError, match="holds a dataset with seed 0, not 1"):
        join("", {"seed": 1})
    with pytest.raises(SaidByFirst, match="no room"):
        join("no room", {"seed": 0})

    store, path, part = dist.HashStore(), tmp_path / "likelihood.json", Part("noise", "vlb", 0, 3)
    Parts(Ranks(store, 0, 2), Record(path, "tiny", {"seed": 0}, {}, []), [part], lambda: None)
    assert Parts(Ranks(store, 1, 2), Record(path, "tiny", {"seed": 0}, {}, []), [], lambda: None).todo == [part]
    with pytest.raises(ValueError, match="process 1 differs from the first, which has seed 0, not 1"):
        Parts(Ranks(store, 1, 2), Record(path, "tiny", {"seed": 1}, {}, []), [], lambda: None)


def test_kills_at_random_moments_lose_nothing(tmp_path):
    write_tiny(tmp_path)
    out = tmp_path / "kills.json"
    words = ["--kills", 4, "--processes", 1, 4, "--format", "png", "--model", tmp_path, "--out", out]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/kill_test.py"), *map(str, words)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())["runs"]
    assert [run["processes"] for run in runs] == [1, 4]
    for run in runs:
        assert run["kills"] >= 4
        assert (run["lost"], run["twice"], run["jobs with equal bytes"]) == (0, 0, run["jobs"])


def test_every_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert options.device_of("auto") == torch.device("cuda:0")
    assert taken == [], "alone it changes nothing"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for local in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert options.device_of("auto") == options.device_of("cuda") == torch.device("cuda", local)
    assert options.device_of("cuda:0") == torch.device("cuda:0"), "what is named is taken"
    assert taken == [0, 0, 1, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this host has no GPU of its own: --nproc-per-node can be 2"):
        options.device_of("auto")


def test_torchrun_without_a_format_is_refused(make, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    expect_a_sentence(lambda: cli.main(["sample"]), "under torchrun give --format: one of npz, png, tar", capsys)

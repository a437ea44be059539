"""The benchmarks' machinery on a machine without a GPU: child processes that die, and the GPU's clock and graphs with
stand-ins that run what they are given at once."""

from __future__ import annotations

import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffkern.bench import children, gpu, ops
from diffkern.bench.rivals import Rival, rivals

CHILD = """
import os, sys, time
sys.path.insert(0, {path!r})
import children  # alone: the rest of the package takes seconds to import

def answer(item):
    print("a library prints")
    if item == "dies":
        os._exit(3)
    if item == "raises":
        raise ValueError("of the item")
    if item == "hangs":
        time.sleep(60)
    return item.upper()

children.serve(answer)
"""


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(path=str(Path(children.__file__).parent)))
    return [script]


def test_what_kills_a_child_costs_its_item_alone(command):
    items = ["a", "dies", "b", "raises", "hangs", "c"]
    found = dict(children.answers(command, items, 2, time.monotonic() + 60, each=5))
    assert {i: found[i] for i in "abc"} == {"a": "A", "b": "B", "c": "C"}
    assert isinstance(found["dies"], children.Failure)
    assert "exit 3" in found["dies"]
    assert found["raises"] == "ValueError: of the item"
    assert "took longer than 5 s" in found["hangs"]


def test_nothing_begins_after_the_time(command):
    found = dict(children.answers(command, ["a", "b"], 1, time.monotonic() - 1, each=5))
    assert set(found.values()) == {"no time was left"}


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Stream:
    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with a device that runs at once; a graph calls what was called while it was captured."""

    @contextmanager
    def block(*args, **kwargs):
        yield

    for name, stand_in in {
        "Event": _Event, "Stream": _Stream, "current_stream": _Stream, "stream": block, "graph": block,
        "synchronize": lambda: None, "_sleep": lambda cycles: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: time.sleep(1e-3)),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_views_of_one_tensor_are_views_of_one_copy():
    packed = torch.randn(2, 3, 4)
    q, k, v = packed.unbind(1)
    other = gpu.again((q, k, v, None, 3, packed[:, :, ::2]))
    assert other[3:5] == (None, 3)
    for a, b in zip((q, k, v, packed[:, :, ::2]), (*other[:3], other[5]), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert len({t.untyped_storage().data_ptr() for t in (*other[:3], other[5])}) == 1
    assert other[0].untyped_storage().data_ptr() != packed.untyped_storage().data_ptr()


def test_inputs_do_not_fit_into_the_cache(cuda):
    assert len(gpu.sets_of((torch.ones(4),), 1 << 16)) == 40
    assert len(gpu.sets_of((torch.ones(4),), 1 << 30)) == 2
    assert len(gpu.sets_of((torch.ones(4),), 16)) == gpu.SETS


def test_calls_are_timed_in_turn(cuda):
    def cannot(x):
        raise RuntimeError("No available kernel.\nand more")

    binds = {"add": lambda x: lambda: x + 1, "cannot": lambda x: lambda: cannot(x)}
    sets = gpu.sets_of((torch.ones(64),), 1 << 18)
    seconds, launched, refused = gpu.interleave(binds, sets, 3)
    assert refused == {"cannot": "No available kernel."}
    assert [len(s) for s in seconds.values()] == [3]
    assert 0 < launched["add"] < 1
    # the stand-in's replay takes a millisecond, however many calls it is of; a busy machine lets some wait
    assert min(seconds["add"]) == pytest.approx(1e-3 / gpu.Replay(binds["add"], sets).calls, rel=2)


def test_a_row_of_a_gpu_says_all_that_was_measured(cuda, monkeypatch):
    held = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(held))
    options = Namespace(op=["rms_norm"], dtype=["float32"], device="cpu", tiny=True, quick=False, shapes=None,
                        rivals=("eager", "other"), backend=[], rounds=2, child=None)  # fmt: skip
    wrong = Rival(ops=lambda op, args, device: {"other": lambda *args: lambda: args[0]})
    monkeypatch.setitem(rivals(), "other", wrong)
    bench = ops.Bench(options)
    bench.cuda = True
    row = bench.time(next(iter(bench.items)), {"GB/s": 1000.0, "TFLOP/s": 100.0})
    assert {"reference", "torch", "copy"} <= set(row["times"])
    assert list(row["refused"]) == ["other"]
    assert row["refused"]["other"].startswith("its result is wrong by ")
    for found in row["times"].values():
        assert {"us", "GB/s", "of copy", "us without a graph", "of floor", "peak MB"} == set(found)
        assert found["peak MB"] == 1.0
        floor = row["bytes"] / 1e12 * 1e6
        assert found["of floor"] == pytest.approx(floor / found["us"]["median"], rel=0.01)

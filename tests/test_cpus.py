"""The CPUs that a benchmark keeps to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkern import cli
from diffkern.bench import cpus, curves_command, end_to_end

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.fixture(name="cores")
def make_cores(tmp_path, monkeypatch):
    """Four CPUs: 0 and 2 are one core, 1 and 3 another."""
    for cpu, beside in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{beside}\n")
    monkeypatch.setattr(cpus, "SYSTEM", tmp_path)
    return tmp_path


def test_threads_get_cores_of_their_own(cores):
    assert cpus.chosen({0, 1, 2, 3}, 2) == [0, 1]
    assert cpus.chosen({0, 2, 3}, 2) == [0, 3]
    assert cpus.chosen({0, 1, 2, 3}, 3) == [0, 1, 2]
    assert cpus.chosen({0, 1}, 8) == [0, 1]
    for cpu in (0, 1):
        (cores / f"cpu{cpu}/topology/thread_siblings_list").write_text("0-1\n")
    (cores / "cpu2/topology/thread_siblings_list").unlink()  # not said: a core of its own
    assert cpus.chosen({0, 1, 2}, 2) == [0, 2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="where processes can be kept on CPUs")
def test_a_benchmark_keeps_to_as_many_cpus_as_threads_and_gives_them_back():
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        with contextlib.suppress(KeyboardInterrupt), cpus.pinned(1):
            assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
            assert cpus.facts()["cpus"] == str(*os.sched_getaffinity(0))
            raise KeyboardInterrupt
        assert os.sched_getaffinity(0) == allowed
    finally:
        torch.set_num_threads(threads)


def test_what_governs_the_clock_is_said_where_it_is_known(cores):
    assert "governor" not in cpus.facts()
    (cores / "cpu0/cpufreq").mkdir()
    (cores / "cpu0/cpufreq/scaling_governor").write_text("performance\n")
    assert cpus.facts()["governor"] == "performance"
    assert ("MHz" in cpus.facts()) == ("cpu MHz" in Path("/proc/cpuinfo").read_text())


@pytest.mark.parametrize("command", ["curves", "end-to-end"])
def test_the_kernels_of_all_rivals_and_sizes_are_kept(command, monkeypatch, tmp_path):
    found = []

    def measure(*_: Any) -> int:
        found.append(os.environ[KERNELS])
        return 0

    monkeypatch.setattr(curves_command, "_measure", measure)
    monkeypatch.setattr(end_to_end, "run", measure)
    run = ["bench", command, "--quick", "--rivals", "none", "--out", str(tmp_path)]
    if command == "end-to-end":
        run += ["--device", "cpu"]
    monkeypatch.setenv(KERNELS, "7")  # what the user says comes first
    assert cli.main(run) == 0
    monkeypatch.delenv(KERNELS)
    assert cli.main(run) == 0
    assert found == ["7", "16384"]

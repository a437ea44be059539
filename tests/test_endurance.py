"""Many threads, forks, ten thousand calls: nothing that a long-running program does changes a result, hangs or fills
the memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_tiny
from torch import Tensor

import diffkern
from diffkern import packing
from diffkern.available import availability
from diffkern.op import OPS
from diffkern.testing import tensors

THREADS = 8
CALLS = 10_000
PATIENCE = 60  # s: what hangs


def small(name: str, n: int = 3) -> list[tuple[Any, ...]]:
    found = [s.args() for s in OPS[name].make_samples("cpu", torch.float32) if not s.workload]
    return [OPS[name].bind(*args) for args in found if sum(a.numel() for a in args if isinstance(a, Tensor)) < 5000][:n]


def everything() -> list[Tensor]:
    """Every op once or more, and some pictures."""
    with torch.no_grad():
        return [r for name, op in OPS.items() for args in small(name) for r in tensors(op(*args))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, 0, 0, equal_nan=True) for x, y in zip(a, b, strict=True))


def together(run: Callable[[int], Any]) -> list[Any]:
    """run(0), run(1), ... in threads that begin at once."""
    gate = threading.Barrier(THREADS)

    def begun(i: int) -> Any:
        gate.wait(PATIENCE)
        return run(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return [done.result(PATIENCE) for done in [pool.submit(begun, i) for i in range(THREADS)]]


def test_eight_threads_get_what_one_gets():
    alone = everything()
    for result in together(lambda i: everything()):
        assert same(result, alone)


def test_eight_threads_choose_their_backends_apart():
    call = next(iter(small("randn")))

    def chosen(i: int) -> set[str]:
        name = "reference" if i % 2 else "auto"
        with diffkern.use_backend(name):
            return {OPS["randn"].choose(call).name for _ in range(500)}

    by_itself = OPS["randn"].choose(call).name
    assert together(chosen) == [{by_itself}, {"reference"}] * (THREADS // 2)


@pytest.mark.skipif(availability("cpu") is not None, reason="only the C++ library's products pack weights")
def test_eight_threads_pack_the_same_weights():
    before = packing.kept_bytes()
    for round in range(5):
        weights = [torch.randn(64, 48, generator=torch.Generator().manual_seed(i + 10 * round)) for i in range(6)]
        pictures = torch.randn(2, 48, 8, 8, generator=torch.Generator().manual_seed(99))
        filters = [w[:, :, None, None].expand(-1, -1, 3, 3).contiguous() for w in weights]
        x = pictures.flatten(2).mT.contiguous()

        def results(_: int, x: Tensor = x, weights: Any = weights, filters: Any = filters, p: Tensor = pictures) -> Any:
            return [diffkern.ops.linear(x, w) for w in weights] + [diffkern.ops.conv2d(p, f) for f in filters]

        found = together(results)
        assert all(same(each, results(0)) for each in found)
        expected = [OPS["linear"].reference(x, w) for w in weights]
        expected += [OPS["conv2d"].reference(pictures, f) for f in filters]
        # Sums of 48 and 432 products of normal numbers in float32, by Winograd's way for the convolutions.
        assert all((a - b).abs().max() < 1e-3 for a, b in zip(found[0], expected, strict=True))
    del weights, filters, found, expected, results
    gc.collect()
    assert packing.kept_bytes() == before, "copies of weights that are gone"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def pictures(folder: Path, seed: int) -> Tensor:
    model = diffkern.load(folder)
    table = diffkern.make_table("dpmpp_2m", model.schedule, 3)
    return diffkern.sample(model.model, table, 2, seed=seed, labels=0, guidance=2.0)


def test_eight_threads_sample_one_model(tiny):
    model = diffkern.load(tiny)
    table = diffkern.make_table("dpmpp_2m", model.schedule, 3)

    def sampled(i: int) -> Tensor:
        return diffkern.sample(model.model, table, 2, seed=i, labels=i % 3, guidance=2.0)

    found = together(sampled)
    assert all(torch.equal(found[i], sampled(i)) for i in range(THREADS))


def _all_threads() -> Tensor:
    """The work of all threads, of PyTorch's and the C++ library's kernels."""
    noise = diffkern.randn(diffkern.noise_keys(0, 8), [1 << 14])
    x = noise[:, : 1 << 12].reshape(8, 64, 8, 8)
    return diffkern.ops.group_norm_silu(x, 8) + noise.exp()[:, -1, None, None, None]


def _in_child(folder: Path, send: Any) -> None:
    made = _all_threads(), pictures(folder, 0), *everything()
    send.send(str([t.tolist() for t in made]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.skipif(availability("cpu") is not None, reason="without the C++ library the threads are PyTorch's alone")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads, which is what this is about
def test_a_fork_after_use_does_not_hang(tiny):
    """GCC's OpenMP waits in a child for the threads of its parent, unless it is told to use one."""

    def results() -> str:
        return str([t.tolist() for t in (_all_threads(), pictures(tiny, 0), *everything())])  # NaN is not itself

    threads, at_first = torch.get_num_threads(), results()
    torch.set_num_threads(1)  # a library's products may depend on their number
    alone = results()
    torch.set_num_threads(threads)
    fork = multiprocessing.get_context("fork")
    for _ in range(2):
        receive, send = fork.Pipe(duplex=False)
        child = fork.Process(target=_in_child, args=(tiny, send))
        child.start()
        try:
            assert receive.poll(PATIENCE), "the child hangs"
            assert receive.recv() == alone
            child.join(PATIENCE)
            assert child.exitcode == 0
        finally:
            child.kill()
            child.join()
    assert results() == at_first, "the parent goes on"


def test_ten_thousand_calls_leave_nothing_behind():
    calls = [(op, args) for name, op in OPS.items() for args in small(name, 2)]

    def run(n: int) -> None:
        with torch.no_grad():
            for i in range(n):
                op, args = calls[i % len(calls)]
                op(*args)

    run(CALLS // 10)  # what is made once
    gc.collect()
    objects, kept = len(gc.get_objects()), packing.kept_bytes()
    before = resident()
    run(CALLS)
    gc.collect()
    assert packing.kept_bytes() == kept
    assert len(gc.get_objects()) - objects < CALLS // 100
    # An allocator may keep a little more; one lost tensor of the smallest kind in each call would be as much.
    assert resident() - before < 4 << 20, "bytes"


def resident() -> int:
    """Bytes of this process in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_every_run_is_the_same(tiny):
    first, drawn = everything(), pictures(tiny, 3)
    for _ in range(3):
        assert same(everything(), first)
        assert torch.equal(pictures(tiny, 3), drawn)

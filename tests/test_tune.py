"""The tuner's parts that need no GPU: what it tries, what it leaves out, and what it writes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_library
import pytest
import torch
from diffkern.kernels.conv2d_cuts import CUTS

from diffkern.available import availability
from diffkern.bench import children
from diffkern.op import OPS, Sample
from diffkern.testing import make

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import tune

pytestmark = pytest.mark.skipif(availability("triton") is not None, reason="needs Triton")

FAST = {"QUERIES": 64, "KEYS": 64, "PARTS": 1, "BLOCKS": 0, "num_warps": 4, "num_stages": 2}
IN_CUDA = {"CUDA": 128}
SLOW, CRASHES = FAST | {"KEYS": 32}, FAST | {"KEYS": 128}


def test_every_workload_has_an_entry_and_shapes_to_try():
    found = tune.plan("attention", 90)
    assert all(shapes for _, shapes in found.values())
    assert {sample for sample, _ in found.values()} <= set(tune.samples("attention", "cpu"))
    sample, shapes = found["bytes 2, dim 80, queries 1024, keys 128, masked 0"]
    assert sample == "SD 1.5 32x32, text"
    assert FAST in shapes
    assert IN_CUDA in shapes
    assert not any("CUDA" in shape for shape in found["bytes 2, dim 72, queries 1024, keys 128, masked 1"][1])


def test_what_does_not_compile_or_spills_is_left_out(monkeypatch, capsys):
    def answers(command, items, processes, until, each):
        reasons = {str(FAST): None, str(SLOW): "12 spills"}
        for item in items:
            text = str(item[2][0])
            yield item, {text: reasons[text]} if text in reasons else children.Failure("exit -9")

    monkeypatch.setattr(children, "answers", answers)
    work = [("attention", "SDXL 32x32", [FAST, SLOW, CRASHES])]
    kept = tune.compiled(work, SimpleNamespace(processes=2), 0.0)
    assert kept == [("attention", "SDXL 32x32", [FAST])]
    assert "12 spills" in capsys.readouterr().out


def test_a_shape_that_ends_its_process_costs_itself_alone(monkeypatch):
    times = {str(FAST): 2.0, str(SLOW): 3.0}

    def answers(command, items, processes, until, each):
        for item in items:
            if CRASHES in item[2]:
                yield item, children.Failure("an illegal memory access")
            else:
                yield item, {"torch": 5.0} | {str(shape): times[str(shape)] for shape in item[2]}

    monkeypatch.setattr(children, "answers", answers)
    found = tune.timed([("attention", "SDXL 32x32", [FAST, CRASHES, SLOW])], 0.0)["attention", "SDXL 32x32"]
    assert found == {"torch": 5.0, str(FAST): 2.0, str(SLOW): 3.0, str(CRASHES): "an illegal memory access"}
    line, entry = tune.best(found, [FAST, CRASHES, SLOW])
    assert entry == {"shape": FAST, "us": 2.0, "torch_us": 5.0}
    assert "2.50x" in line
    assert "illegal memory access" in line
    assert tune.best({"torch": 5.0}, [FAST])[1] is None


def test_the_table_keeps_the_fastest_of_triton_and_of_cuda():
    """So that one serves where the other cannot be built."""
    answer = {"torch": 5.0, str(FAST): 3.0, str(SLOW): 4.0, str(IN_CUDA): 2.0, str({"CUDA": 64}): 2.5}
    line, entry = tune.best(answer, [FAST, SLOW, IN_CUDA, {"CUDA": 64}])
    assert entry == {"shape": FAST, "us": 3.0, "torch_us": 5.0, "cuda_us": 2.0, "cuda_block": 128}
    assert line.startswith("torch     5.00 us   2.50x   2.00 CUDA-128   2.50 CUDA-64   3.00 64-64")
    assert tune.best({"torch": 5.0, str(IN_CUDA): 2.0}, [IN_CUDA])[1] is None


def test_a_shape_is_checked_before_it_is_timed(monkeypatch):
    """In the interpreter, with a clock that stands still."""
    args = tuple(make((1, n, 2, 16), "cpu", torch.bfloat16, seed=n) for n in (9, 20, 20))
    sample = Sample("small", lambda: args, True)
    monkeypatch.setattr(tune, "samples", lambda name, device: {"small": sample})
    monkeypatch.setattr(tune.gpu, "sets_of", lambda args, moved: [args])
    monkeypatch.setattr(tune.gpu, "interleave", interleave)
    wrong = FAST | {"KEYS": 16, "BLOCKS": 2}  # leaves out keys
    right = FAST | {"QUERIES": 16, "KEYS": 32, "BLOCKS": 2}
    found = tune.Child(compiles=False).answer(("attention", "small", [right, wrong]))
    assert set(found) == {str(right), str(wrong), "torch"}
    assert found[str(right)] == found["torch"] == 1.0
    assert "times what is allowed" in found[str(wrong)]
    assert OPS["attention"].backends[-1].name == "torch"


def test_moments_are_timed_with_the_norm_that_takes_them(monkeypatch):
    """In the interpreter, with a clock that stands still."""
    key = "bytes 2, pixels 1024, channels 128"
    own = [{"MOMENTS": 1, **cut._asdict()} for cut in CUTS]
    shapes = [{"MOMENTS": 0}, {"MOMENTS": 1}, own[0]]
    assert tune.plan("conv2d_moments", 90)[key] == ("CIFAR UNet 32x32, 1 picture", shapes[:2] + own)
    assert tune.plan("conv2d_moments", 80)[key][1] == shapes[:2]
    x, weight = (make(shape, "cpu", torch.bfloat16, "channels_last") for shape in ((2, 8, 8, 16), (64, 8, 3, 3)))
    args = OPS["conv2d_moments"].bind(x, weight / 8)
    monkeypatch.setattr(tune, "samples", lambda name, device: {"small": Sample("small", lambda: args, True)})
    monkeypatch.setattr(tune.gpu, "sets_of", lambda args, moved: [args])
    monkeypatch.setattr(tune.gpu, "interleave", interleave)
    plain, given = tune.group_norm_silu, []

    def norm(y, groups, moments=None):
        given.append((moments is not None, plain(y, groups, moments=moments)))
        return given[-1][1]

    monkeypatch.setattr(tune, "group_norm_silu", norm)
    answer = tune.Child(compiles=False).answer(("conv2d_moments", "small", shapes))
    assert answer == {**{str(shape): 1.0 for shape in shapes}, "torch": 1.0}
    assert [asked for asked, _ in given] == [False, True, True] * 2
    for _, y in given:
        expected = tune.plain_convolution_and_norm(*args)
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert tune.best({"torch": 5.0, str(shapes[0]): 3.0, str(own[0]): 2.0}, shapes)[1]["shape"] == own[0]


def test_a_group_norm_is_timed_in_both_languages(monkeypatch, tmp_path_factory):
    """In the interpreter, and thread by thread, with a clock that stands still."""
    found = tune.plan("group_norm_silu", 90)
    sample, shapes = found["bytes 2, pixels 1024, channels 640, groups 32"]
    assert sample == "SD 1.5 UNet 32x32, channels_last"
    assert shapes == [{}, {"CUDA": 0}, {"CUDA": 16}, {"CUDA": 32}, {"CUDA": 64}, {"CUDA": 96}]
    assert not any("contiguous" in name for name, _ in found.values()), "there is nothing to choose"
    args = OPS["group_norm_silu"].bind(make((2, 16, 24, 24), "cpu", torch.bfloat16, "channels_last"), 4)
    monkeypatch.setattr(tune, "samples", lambda name, device: {"small": Sample("small", lambda: args, True)})
    monkeypatch.setattr(tune.gpu, "sets_of", lambda args, moved: [args])
    monkeypatch.setattr(tune.gpu, "interleave", interleave)
    folder = tmp_path_factory.getbasetemp()
    with cuda_library.loaded(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder):
        answer = tune.Child(compiles=False).answer(("group_norm_silu", "small", shapes[:3]))
    assert answer == {"{}": 1.0, "{'CUDA': 0}": 1.0, "{'CUDA': 16}": 1.0, "torch": 1.0}
    line, entry = tune.best({"torch": 9.0, "{}": 4.0, "{'CUDA': 0}": 3.0, "{'CUDA': 16}": 2.0}, shapes)
    assert entry == {"shape": {}, "us": 4.0, "torch_us": 9.0, "cuda_us": 2.0, "cuda_block": 16}
    assert "2.00 CUDA-16   3.00 CUDA-0   4.00 no shape" in line


def test_every_op_that_is_tuned_has_a_rival():
    assert tune.timed_of("group_norm_silu")[1] is tune.PLAIN["group_norm_silu"]
    for name in ("attention", "conv2d", "linear"):
        assert tune.timed_of(name)[1] is next(b for b in OPS[name].backends if b.name == "torch")


def interleave(binds, sets, rounds):
    for bind in binds.values():
        bind(*sets[0])()
    return {name: [1e-6] * rounds for name in binds}, {}, {}

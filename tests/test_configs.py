"""The tables of launch shapes: what is looked up, what is chosen by them, and that those that are here are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffkern.kernels
import pytest
import torch
from diffkern.kernels import configs

from diffkern.available import availability
from diffkern.op import OPS
from diffkern.testing import make

needs_triton = pytest.mark.skipif(availability("triton") is not None, reason="needs Triton")
TABLES = sorted(Path(diffkern.kernels.__path__[0], "configs").glob("*.json"))
SHAPE = {"QUERIES": 64, "KEYS": 64, "PARTS": 1, "BLOCKS": 0, "num_warps": 4, "num_stages": 2}


def test_a_bucket_ends_at_a_power_of_two():
    found = {length: configs.bucket(length) for length in (1, 16, 17, 64, 77, 256, 257, 4096, 4097, 1 << 20)}
    assert found == {
        1: 16, 16: 16, 17: 32, 64: 64, 77: 128, 256: 256, 257: 512, 4096: 4096, 4097: 4096, 1 << 20: 4096,
    }  # fmt: skip


def test_an_entry_is_found_by_architecture_kernel_and_facts(monkeypatch):
    tables = {90: {"attention": {"dim 40, keys 128": {"shape": SHAPE, "us": 1.5, "torch_us": 2}}}}
    monkeypatch.setattr(configs, "_table", lambda arch: tables.get(arch, {}))
    key = configs.key(dim=40, keys=128)
    assert configs.tuned("attention", key, 90) == configs.Tuned(SHAPE, 1.5, 2)
    assert configs.tuned("attention", key, 80) is None
    assert configs.tuned("conv2d", key, 90) is None
    assert configs.tuned("attention", configs.key(dim=48, keys=128), 90) is None


def test_a_shape_is_on_trial_only_inside_the_block():
    key = "dim 40"
    with configs.trying(lambda kernel, key: SHAPE if kernel == "attention" else None):
        assert configs.on_trial("attention", lambda: key) == SHAPE
        assert configs.on_trial("conv2d", lambda: key) is None
    assert configs.on_trial("attention", lambda: key) is None


@needs_triton
@pytest.mark.parametrize(
    ("times", "chosen"), [((9.0, 10.0), True), ((10.0, 10.0), False), ((10.0, 9.0), False), (None, False)]
)
def test_attention_is_left_to_pytorch_unless_it_was_measured_as_faster(times, chosen, monkeypatch):
    from diffkern.kernels import attention_cuts as kernels

    key = "bytes 2, dim 40, queries 128, keys 128, masked 0"
    entry = times and {"shape": SHAPE, "us": times[0], "torch_us": times[1]}
    monkeypatch.setattr(configs, "_table", lambda arch: {"attention": {key: entry}} if entry else {})
    q, k, v = (make((1, n, 2, 40), "cpu", torch.float16) for n in (100, 77, 77))
    triton = next(b for b in OPS["attention"].backends if b.name == "triton")
    kernels._found.cache_clear()
    try:
        reason = triton.why_defer((q, k, v, None, None))
        assert (reason is None) is chosen
        assert triton.why_defer((q.float(), k.float(), v.float(), None, None)) is not None, "another size of number"
        assert triton.why_defer((q[:, :10], k, v, None, None)) is not None, "another length"
        mask = torch.ones(100, 77).bool()
        assert triton.why_defer((q, k, v, None, mask)) is None, "a mask, of which nothing was measured"
        assert triton.why_defer((q.float(), k.float(), v.float(), None, mask)) is not None, "a mask in float32"
    finally:
        kernels._found.cache_clear()


@pytest.mark.parametrize(
    ("us", "torch_us", "cuda", "chosen"),
    [
        (9.0, 10.0, {"cuda_us": 8.9, "cuda_block": 64}, True),
        (9.0, 10.0, {"cuda_us": 9.0, "cuda_block": 128}, False),
        (9.0, 7.0, {"cuda_us": 8.0, "cuda_block": 64}, False),
        (9.0, 10.0, {}, False),
        (None, None, {}, False),
    ],
)
def test_attention_in_cuda_is_chosen_only_where_it_was_measured_as_fastest(us, torch_us, cuda, chosen, monkeypatch):
    from diffkern.kernels import attention_cuts as kernels

    key = "bytes 2, dim 40, queries 128, keys 128, masked 0"
    entry = {"shape": SHAPE, "us": us, "torch_us": torch_us} | cuda
    monkeypatch.setattr(configs, "_table", lambda arch: {"attention": {key: entry}} if us else {})
    q, k, v = (make((1, n, 2, 40), "cpu", torch.float16) for n in (100, 77, 77))
    cuda_kernel = next(b for b in OPS["attention"].backends if b.name == "cuda")
    kernels._found.cache_clear()
    try:
        assert (cuda_kernel.why_defer((q, k, v, None, None)) is None) is chosen
        assert cuda_kernel.why_defer((q[:, :10], k, v, None, None)) is not None, "another length"
        assert kernels.cuda_block(q, 77) == cuda.get("cuda_block", 64), "measured, or the default"
        with configs.trying(lambda kernel, key: {configs.CUDA: 96}):
            assert kernels.cuda_block(q, 77) == 96, "on trial"
    finally:
        kernels._found.cache_clear()


def test_blocks_of_cuda():
    from diffkern.kernels.attention_cuts import cuda_blocks

    assert cuda_blocks(72, 256, 256, 2, 0) == [64, 128]
    assert cuda_blocks(80, 1024, 77, 2, 0) == [128, 64]
    assert cuda_blocks(88, 1024, 77, 2, 0) == cuda_blocks(160, 4096, 4096, 2, 0) == cuda_blocks(40, 64, 9, 2, 0) == [64]
    for cannot in ((168, 64, 64, 2, 0), (44, 64, 64, 2, 0), (40, 64, 64, 4, 0), (40, 64, 64, 2, 1)):
        assert cuda_blocks(*cannot) == []


@needs_triton
@pytest.mark.parametrize(
    ("dim", "tokens", "keys", "dtype", "chosen"),
    [
        (512, 1024, 1024, torch.bfloat16, True),
        (512, 4096, 4096, torch.float16, True),
        (512, 512, 1024, torch.bfloat16, False),
        (512, 1024, 1025, torch.bfloat16, False),
        (516, 1024, 1024, torch.bfloat16, False),
        (512, 1024, 1024, torch.float32, False),
        (256, 1024, 1024, torch.bfloat16, False),
    ],
)
def test_attention_of_wide_heads_is_products_of_a_library(dim, tokens, keys, dtype, chosen):
    from diffkern.kernels.attention_cuts import cut_of, tuning

    q, k = (torch.empty(1, n, 1, dim, dtype=dtype, device="meta") for n in (tokens, keys))
    triton = next(b for b in OPS["attention"].backends if b.name == "triton")
    assert (cut_of(q, keys, None, True, 90) is None) is chosen
    assert ({} in tuning(q, k, k, None, None, 90)[1]) is chosen
    assert (triton.why_defer((q, k, k, None, None)) is None) is chosen
    with configs.trying(lambda kernel, key: SHAPE):
        assert cut_of(q, keys, None, True, 90) is not None


@needs_triton
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_is_whole(path):
    from diffkern.kernels.attention_cuts import Cut

    table = json.loads(path.read_text("utf-8"))
    assert table["gpu"]
    assert table["versions"]["triton"]
    for key, entry in table["kernels"].get("attention", {}).items():
        found = configs.Tuned(**entry)
        assert found.us > 0 < found.torch_us
        assert (found.cuda_block in (64, 128)) is (found.cuda_us < math.inf)
        if not found.shape:  # a library's
            continue
        cut = Cut(**found.shape)
        keys = int(key.split("keys ")[1].split(",")[0])
        assert not cut.BLOCKS or keys <= cut.KEYS, "keys that stay fit into one block"


@needs_triton
@pytest.mark.parametrize("dim", [8, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512])
@pytest.mark.parametrize("keys", [1, 16, 64, 77, 256, 1000, 4096])
def test_every_candidate_fits(dim, keys):
    from diffkern.kernels.attention_cuts import candidates, tiles

    d1, d2 = tiles(dim)
    assert d1 + d2 >= dim
    for arch in (80, 86, 90, 100):
        for queries in (1, 64, 256, 4096):
            found = list(candidates(dim, queries, keys, 2, 0, arch))
            assert len(found) == len(set(found))
            assert found or configs.shared_memory(arch) < 227 * 1024
            for cut in found:
                assert d1 % cut.PARTS == 0
                assert not cut.BLOCKS or keys <= cut.KEYS

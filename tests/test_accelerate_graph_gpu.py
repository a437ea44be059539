"""On a GPU: calls of accelerated networks recorded in CUDA graphs give the bits of the same network without, and their
replays do not wait for the device."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import diffkern
from diffkern.graphs import calls

diffusers = pytest.importorskip("diffusers")

from diffusers_models import MODELS, PROMPT, make, moved, pixels  # noqa: E402 (after the check for diffusers)
from test_accelerate_pipelines import controlnet, picture  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICE = "cuda"
BEFORE = calls.BEFORE["auto"]
NAMES = [name for name in MODELS if name not in ("tiny VAE", "VAE", "VAE without attention")]


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """A graph that could not be had is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a graph.*")
        yield


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Inside, what waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def both(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Without graphs and with."""
    models = make(name, dtype).to(DEVICE), make(name, dtype).to(DEVICE)
    options: tuple[bool | str, ...] = (False, "auto")
    for model, option in zip(models, options, strict=True):
        diffkern.accelerate(model, cuda_graph=option)
    return models


def on_gpu(value: Any, dtype: torch.dtype = torch.float32) -> Any:
    return moved(value, dtype, DEVICE)


def recorded(model: Any) -> int:
    found = vars(model).get(calls.NAME)
    return 0 if found is None else sum(graph is not None for graph in found.graphs.kept.values())


def same(a: Any, b: Any) -> bool:
    pairs = [(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True) if isinstance(x, Tensor)]
    return type(a) is type(b) and all(x.stride() == y.stride() and torch.equal(x, y) for x, y in pairs)


def _shifted(value: Any, i: int, classes: bool) -> Any:
    if not isinstance(value, Tensor) or (not value.is_floating_point() and (classes or value.max() <= 1)):
        return value
    return value + 0.01 * i if value.is_floating_point() else value + i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_calls_with_other_numbers(name: str, dtype: torch.dtype) -> None:
    plain, model = both(name, dtype)
    args, kwargs = on_gpu(MODELS[name][2](), dtype)
    given = [tree_map(lambda t, i=i: _shifted(t, i, "class_labels" in kwargs), (args, kwargs)) for i in range(8)]
    found = []
    for i, (call_args, call_kwargs) in enumerate(given):
        with no_wait() if i > BEFORE else contextlib.nullcontext():
            found.append(model(*call_args, **call_kwargs))
    assert recorded(model) == 1
    for (call_args, call_kwargs), got in zip(given, found, strict=True):
        assert same(got, plain(*call_args, **call_kwargs))
    assert not same(found[0], found[-1])


@pytest.mark.parametrize("name", ["VAE", "tiny VAE"])
@torch.no_grad()
def test_encoders_and_decoders(name: str) -> None:
    plain, model = both(name)
    for part, channels, size in (("encoder", 3, 32), ("decoder", 4, 8)):
        given = [on_gpu(pixels(channels, size)) + 0.1 * i for i in range(BEFORE + 3)]
        found = [getattr(model, part)(x) for x in given]
        assert recorded(getattr(model, part)) == 1
        assert all(same(y, getattr(plain, part)(x)) for x, y in zip(given, found, strict=True))


@pytest.mark.parametrize("name", ["DDPM", "SD 1.5"])
@torch.no_grad()
def test_a_timestep_on_the_host(name: str) -> None:
    plain, model = both(name)
    kwargs = on_gpu(PROMPT) if name == "SD 1.5" else {}
    x = on_gpu(pixels(3 if name == "DDPM" else 4))
    kinds: list[Any] = [int, lambda i: i + 0.5, lambda i: torch.tensor(i), lambda i: torch.tensor(i / 3)]
    for kind in kinds:
        found = []
        for i in range(10, 16):
            with no_wait() if i > 10 + BEFORE else contextlib.nullcontext():
                found.append(model(x, kind(i), **kwargs))
        for i, got in zip(range(10, 16), found, strict=True):
            assert same(got, plain(x, kind(i), **kwargs))
    assert recorded(model) == (2 if name == "DDPM" else 3)


def test_a_pipeline_with_a_controlnet() -> None:
    (plain, call), (pipe, _) = controlnet(), controlnet()
    options: tuple[bool | str, ...] = (False, "auto")
    for each, option in zip((plain, pipe), options, strict=True):
        diffkern.accelerate(each, cuda_graph=option)  # before it is moved, as users do
        each.scheduler = diffusers.DDIMScheduler()
        each.to(DEVICE)
    for arguments in (
        call,
        {**call, "prompt_embeds": 0.5 * call["prompt_embeds"]},
        {**call, "num_images_per_prompt": 2},
    ):
        on = {k: on_gpu(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        assert np.array_equal(picture(pipe, on), picture(plain, on))
    assert recorded(pipe.unet) >= 2
    assert recorded(pipe.controlnet) >= 2


@torch.no_grad()
def test_weights_and_adapters_that_change_show() -> None:
    peft = pytest.importorskip("peft")
    plain, model = both("SD 1.5")
    args, kwargs = on_gpu(MODELS["SD 1.5"][2]())

    def agree() -> None:
        want = plain(*args, **kwargs)
        assert all(same(model(*args, **kwargs), want) for _ in range(BEFORE + 2))
        assert recorded(model) == 1

    agree()
    for m in (plain, model):
        for p in m.parameters():
            p.mul_(1.05)
    agree()
    for m in (plain, model):
        m.load_state_dict({k: 1.05 * v for k, v in m.state_dict().items()}, assign=True)
    agree()
    for m in (plain, model):
        torch.manual_seed(1)
        m.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "conv1"], init_lora_weights=False), "a")
    for change, told in (("set_adapters", ("a", 1.0)), ("set_adapters", ("a", 0.3)), ("fuse_lora", ()),
                         ("unfuse_lora", ())):  # fmt: skip
        for m in (plain, model):
            getattr(m, change)(*told)
        agree()


@torch.no_grad()
def test_another_stream_comes_after_the_first() -> None:
    plain, model = both("DDPM")
    given = [on_gpu(pixels(3)) + i for i in range(9)]
    expected = [plain(x, 5).sample for x in given]
    torch.cuda.synchronize()
    got = []
    for x in given:
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append(model(x, 5).sample)
    torch.cuda.synchronize()
    assert recorded(model) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@torch.no_grad()
def test_inside_another_recording_and_freed_with_the_model() -> None:
    plain, model = both("DDPM")
    x, t = on_gpu(pixels(3)), torch.tensor([5], device=DEVICE)
    for _ in range(BEFORE):
        model(x, t)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        out = model(x, t).sample
    assert recorded(model) == 0
    graph.replay()
    assert torch.equal(out, plain(x, t).sample)
    model(x, t)
    assert recorded(model) == 1
    gone = weakref.ref(vars(model)[calls.NAME])
    del model, graph
    gc.collect()
    assert gone() is None

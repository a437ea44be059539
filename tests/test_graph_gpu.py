"""CUDA graphs on a GPU: every result is that of the same run without, bit for bit, and memory stays bounded."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from folders import write_tiny
from graphs import SHAPE, TABLES, Pointwise, make_dit, make_prompted, table

import diffkern
from diffkern.graphs import kept
from diffkern.samplers import graph

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICE = "cuda"


@pytest.fixture(name="tiny")
def make_tiny(tmp_path):
    return diffkern.load(write_tiny(tmp_path), device=DEVICE).model


@pytest.fixture(autouse=True)
def _no_warning():
    """A graph that could not be had is a failure, unless a test expects the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a graph.*")
        yield


def both(model: Any, n: int = 3, made: Any = None, **options: Any) -> torch.Tensor:
    """What a run that records, and one that replays only, give; checked to be what comes without graphs."""
    made = table() if made is None else made
    # False last: it frees the graphs.
    first, second = (diffkern.sample(model, made, n, cuda_graph=True, **options) for _ in range(2))
    expected = diffkern.sample(model, made, n, cuda_graph=False, **options)
    assert torch.isfinite(expected).all()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    return expected


def recorded(network: Any) -> int:
    """How many graphs a network has."""
    return sum(any(g.recordings.values()) for g in graph._of_network[network].kept.values())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "dpmpp_2m_sde", "heun", "plms", "unipc, order 3"])
def test_samplers_with_noise_history_and_base(name, channels_last):
    model, made = Pointwise(channels_last).to(DEVICE), TABLES[name]()
    both(model, made=made, shape=SHAPE, seed=4)
    both(model, made=made, shape=SHAPE, labels=[2, 0, 5], guidance=2.5, null_label=0)


@pytest.mark.parametrize(
    ("name", "dtype"), [("dpmpp_2m", torch.float32), ("unipc", torch.bfloat16), ("ddpm", torch.float16)]
)
def test_a_unet(tmp_path, name, dtype):
    model = diffkern.load(write_tiny(tmp_path), device=DEVICE, dtype=dtype).model
    both(model, 5, table(name), labels=[0, 1, 2, 0, 1], guidance=2.0, batch_size=2)


def test_a_dit():
    model = make_dit().to(DEVICE)
    both(model, 4, table("dpmpp_3m"), labels=[0, 1, 1, 0], guidance=1.5)


def test_a_second_prompt_has_the_graph_of_the_first():
    model, text = make_prompted()
    model, text = model.to(DEVICE), text.to(DEVICE)
    prompts = [model.given(scale * text) for scale in (1.0, -0.5)]
    with_graphs = [diffkern.sample(p, table(), 2, guidance=3.0, cuda_graph=True) for p in prompts]
    assert recorded(model) == 1
    for prompt, got in zip(prompts, with_graphs, strict=True):
        assert torch.equal(got, diffkern.sample(prompt, table(), 2, guidance=3.0, cuda_graph=False))
    assert not torch.equal(*with_graphs)


def test_emoji_32_takes_graphs_by_itself():
    emoji = diffkern.load("emoji-32", device=DEVICE, dtype=torch.bfloat16)
    made = diffkern.make_table("dpmpp_2m", emoji.schedule, 20)
    options: dict[str, Any] = {"labels": [i % len(emoji.labels) for i in range(36)], "guidance": 3.0}
    first, second = (diffkern.sample(emoji.model, made, 36, **options) for _ in range(2))
    assert recorded(emoji.model) == 1
    expected = diffkern.sample(emoji.model, made, 36, cuda_graph=False, **options)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert torch.isfinite(expected).all()


def test_another_batch_shape_and_backend_are_recorded_anew(tiny):
    options: dict[str, Any] = {"labels": 1, "cuda_graph": True}
    for n, more in ((2, {}), (5, {}), (2, {"shape": (3, 12, 12)}), (2, {"guidance": 2.0})):
        first, second = (diffkern.sample(tiny, table(), n, **options, **more) for _ in range(2))
        assert torch.equal(first, second)
    assert recorded(tiny) == 4
    with diffkern.use_backend("reference"):
        reference = diffkern.sample(tiny, table(), 2, **options)
    with diffkern.batch_invariant():
        invariant = diffkern.sample(tiny, table(), 2, **options)
    assert recorded(tiny) == 6
    with diffkern.use_backend("reference"):
        assert torch.equal(reference, diffkern.sample(tiny, table(), 2, labels=1, cuda_graph=False))
    with diffkern.batch_invariant():
        assert torch.equal(invariant, diffkern.sample(tiny, table(), 2, labels=1, cuda_graph=False))


def test_weights_that_change_in_place_show(tiny):
    options: dict[str, Any] = {"labels": 1, "cuda_graph": True}
    before = diffkern.sample(tiny, table(), 2, **options)
    with torch.no_grad():
        for p in tiny.parameters():
            p.mul_(1.05)
    after = diffkern.sample(tiny, table(), 2, **options)
    assert not torch.equal(after, before)
    assert torch.equal(after, diffkern.sample(tiny, table(), 2, labels=1, cuda_graph=False))


def test_weights_that_are_others_show(tiny):
    options: dict[str, Any] = {"labels": 1, "cuda_graph": True}
    before = diffkern.sample(tiny, table(), 2, **options)
    tiny.load_state_dict({k: v * 1.05 for k, v in tiny.state_dict().items()}, assign=True)
    after = diffkern.sample(tiny, table(), 2, **options)
    assert not torch.equal(after, before)
    assert torch.equal(after, diffkern.sample(tiny, table(), 2, labels=1, cuda_graph=False))


class _Unrecordable(Pointwise):
    """Does in its call what a recording does not stand."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x, t, labels=None):
        if self.what == "item":
            return super().forward(x, t, labels) * (1 + x.mean().item())
        if self.what == "synchronize":
            torch.cuda.synchronize()
        elif self.what == "to the host":
            t = t.cpu().to(x.device)
        elif self.what == "from the host":
            t = t + torch.tensor([1.0, 2.0, 3.0], device=x.device)
        elif torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x, t, labels)


@pytest.mark.parametrize("what", ["item", "synchronize", "to the host", "from the host", "memory"])
def test_what_cannot_be_recorded_runs_without_after_one_warning(tiny, what):
    model = _Unrecordable(what).to(DEVICE)
    torch.cuda.manual_seed(3)
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="without a graph") as caught:
        got = diffkern.sample(model, table(), 6, shape=SHAPE, batch_size=3, cuda_graph=True)
    assert len([w for w in caught if "without a graph" in str(w.message)]) == 1
    assert torch.equal(got, diffkern.sample(model, table(), 6, shape=SHAPE, batch_size=3, cuda_graph=False))
    # All else is as if nothing had been tried: streams, random numbers, memory, and other recordings.
    assert torch.cuda.current_stream() == stream
    drawn = torch.randn(5, device=DEVICE)
    torch.cuda.manual_seed(3)
    assert torch.equal(drawn, torch.randn(5, device=DEVICE))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    both(tiny, 2, labels=1)


def test_random_numbers_of_the_model_are_those_of_a_run_without():
    class Noisy(Pointwise):
        def forward(self, x, t, labels=None):
            return super().forward(x, t, labels) + 0.01 * torch.randn_like(x)

    model = Noisy().to(DEVICE)
    results = []
    for cuda_graph in (True, True, False):
        torch.cuda.manual_seed(7)
        results.append(diffkern.sample(model, table(), 3, shape=SHAPE, cuda_graph=cuda_graph))
        results.append(torch.randn(4, device=DEVICE))
    for got, expected in zip(results[:4], results[4:] * 2, strict=True):
        assert torch.equal(got, expected)


def test_another_stream_comes_after_the_first(tiny):
    options: dict[str, Any] = {"labels": 1, "cuda_graph": True}
    expected = [diffkern.sample(tiny, table(), 4, labels=1, seed=s, cuda_graph=False) for s in range(4)]
    torch.cuda.synchronize()
    got = []
    for seed in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append(diffkern.sample(tiny, table(), 4, seed=seed, **options))
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_callbacks_and_trajectories_see_every_step(tiny):
    seen: list[torch.Tensor] = []
    out, path = diffkern.sample(
        tiny, table(), 2, labels=1, cuda_graph=True, trajectory=True, callback=lambda p: seen.append(p.x)
    )
    _, expected = diffkern.sample(tiny, table(), 2, labels=1, cuda_graph=False, trajectory=True)
    assert torch.equal(path, expected)
    assert torch.equal(torch.stack(seen), expected[1:])
    assert torch.equal(out, expected[-1])


def _reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_memory_stays_bounded_over_many_shapes_and_is_given_back(tmp_path):
    model = diffkern.load(write_tiny(tmp_path), device=DEVICE).model
    before, after = _reserved(), []
    for _ in range(3):
        for n in range(1, 21):
            diffkern.sample(model, table(), n, labels=1, shape=(3, 64, 64), cuda_graph=True)
        assert recorded(model) == kept.LIMIT
        after.append(_reserved())
    # Reserved are blocks of 2 and 20 MiB: a second time the same shapes need the same, give or take a few of them.
    assert max(after[1:]) <= after[0] + (64 << 20)
    del model
    assert _reserved() <= before + (16 << 20)


def test_graphs_are_freed_with_the_model(tmp_path):
    model = diffkern.load(write_tiny(tmp_path), device=DEVICE).model
    diffkern.sample(model, table(), 2, labels=1, cuda_graph=True)
    gone, graphs = weakref.ref(model), weakref.ref(graph._of_network[model])
    del model
    gc.collect()
    assert gone() is None
    assert graphs() is None

"""Steps that are recorded and replayed, on a CPU. tests/test_graph_gpu.py has what only a GPU shows."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from folders import write_tiny
from graphs import (
    SHAPE,
    TABLES,
    CPURecorder,
    Pointwise,
    counted,
    make_prompted,
    plain_loop,
    table,
)

import diffkern
from diffkern.graphs import kept
from diffkern.samplers import graph


@pytest.fixture(name="on_cpu")
def _on_cpu():
    with counted() as patch:
        yield patch


@pytest.fixture(scope="module", name="tiny")
def make_tiny(tmp_path_factory):
    return diffkern.load(write_tiny(tmp_path_factory.mktemp("tiny"))).model


def draw(model: Any, n: int = 3, name: str = "dpmpp_2m", steps: int = 9, **options: Any) -> Any:
    options = {"shape": SHAPE, "cuda_graph": True, **({"null_label": 0} if "labels" in options else {}), **options}
    return diffkern.sample(model, table(name, steps), n, **options)


def eagerly(model: Any, *args: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "has_graphs", lambda device: False)
        return draw(model, *args, **{**options, "cuda_graph": "auto"})


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_steps_eager_recorded_and_replayed_equal_the_plain_loop(name, channels_last):
    """All states of a run, in the first that records and in the next."""
    model, made = Pointwise(channels_last), TABLES[name]()
    guided: dict[str, Any] = {"labels": torch.tensor([2, 0, 5]), "guidance": 2.5}
    for told in ({}, guided):
        expected = torch.stack(plain_loop(model, made, 3, seed=4, **told))
        options: dict[str, Any] = {"shape": SHAPE, "seed": 4, "null_label": 0 if told else None, "trajectory": True}
        assert torch.equal(diffkern.sample(model, made, 3, **options, **told)[1], expected)
        with counted():
            replays = 0
            for recorded in ([2], [0] if channels_last else [], []):  # the steps that are
                out, path = diffkern.sample(model, made, 3, cuda_graph=True, **options, **told)
                assert torch.equal(path, expected)
                assert torch.equal(out, expected[-1])
                replays += len(made) - len(recorded) - (2 if recorded == [2] else 0)
                assert CPURecorder.last.replays == replays
            assert CPURecorder.last.records == (2 if channels_last else 1)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_short_runs(on_cpu, steps, channels_last):
    model = Pointwise(channels_last)
    expected = eagerly(model, name="ddim", steps=steps)
    for _ in range(4):
        before = getattr(CPURecorder, "last", None) and CPURecorder.last.replays
        assert torch.equal(draw(model, name="ddim", steps=steps), expected)
    assert CPURecorder.last.replays - before == steps
    assert CPURecorder.last.records == (2 if channels_last and steps > 1 else 1)


@pytest.mark.parametrize("name", ["ddpm", "unipc"])
def test_a_network_with_conditioning(on_cpu, tiny, name):
    """A batch with fewer different labels has the same graph, though its rows lie elsewhere; and a part of the steps
    is told at a time."""
    on_cpu.setattr("diffkern.samplers.step._ROWS", 7)
    for labels in ([0, 1, 2, 0], [1, 1, 1, 1], [3, 2, 1, 0]):
        options: dict[str, Any] = {"shape": None, "labels": labels, "guidance": 2.0, "null_label": 3, "seed": 5}
        assert torch.equal(draw(tiny, 4, name, 4, **options), eagerly(tiny, 4, name, 4, **options))
    assert CPURecorder.last.records == 2
    options["batch_size"] = 2
    assert torch.equal(draw(tiny, 4, name, 4, **options), eagerly(tiny, 4, name, 4, **options))
    assert CPURecorder.last.records == 4


def test_a_second_prompt_has_the_graph_of_the_first(on_cpu):
    model, text = make_prompted()
    for scale in (1.0, -0.5):
        prompt = model.given(scale * text)
        options: dict[str, Any] = {"shape": None, "guidance": 3.0, "steps": 3}
        assert torch.equal(draw(prompt, 2, **options), eagerly(prompt, 2, **options))
    assert CPURecorder.last.records == 2
    assert len(graph._of_network) == 1
    with pytest.raises(ValueError, match="a batch of 3 takes 1 row, 2 for its halves, or 3, not 2"):
        draw(prompt, 3, shape=None)


def test_what_is_another_graph_and_what_is_not(on_cpu):
    model = Pointwise()
    draw(model, seed=1)
    draw(model, seed=2, sample_ids=[5, 6, 7])
    assert CPURecorder.last.records == 1
    others: list[Any] = [
        {"n": 2}, {"steps": 10}, {"name": "dpmpp_3m"}, {"name": "ddpm"}, {"shape": (3, 5, 5)}, {"labels": 1},
        {"labels": 1, "guidance": 2.0},
    ]  # fmt: skip
    for i, other in enumerate(others):
        for _ in range(2):
            draw(model, **other)
        assert CPURecorder.last.records == 2 + i, other
    with diffkern.use_backend("reference"), pytest.warns(RuntimeWarning, match="the model reads a tensor's numbers"):
        draw(model)  # the reference's check of the rows
    for _ in range(2):
        with diffkern.batch_invariant():
            draw(model)
    assert CPURecorder.last.records == 10


def test_a_guidance_scale_is_read_where_it_lies(on_cpu):
    model = Pointwise()
    for scale in (2.0, 3.0, torch.tensor([1.5, 0.0, 7.0])):
        options: dict[str, Any] = {"labels": [1, 2, 3], "guidance": scale}
        assert torch.equal(draw(model, **options), eagerly(model, **options))
    assert CPURecorder.last.records == 1


def test_weights_that_change_in_place_show_without_a_new_recording(on_cpu):
    model = Pointwise()
    first = draw(model)
    with torch.no_grad():
        model.weight.mul_(1.1)
    assert torch.equal(draw(model), eagerly(model))
    model.weight.data += 0.2
    assert torch.equal(draw(model), eagerly(model))
    assert not torch.equal(draw(model), first)
    assert CPURecorder.last.records == 1


def test_a_model_that_is_another_is_recorded_anew(on_cpu):
    model = Pointwise()

    def assign():
        model.load_state_dict({"weight": torch.full((3, 1, 1), 0.3)}, strict=True, assign=True)

    def narrow():
        model.bfloat16()

    def hook():
        model.register_forward_hook(lambda module, args, output: output / 2)

    changes = [assign, narrow, hook, model.eval]
    draw(model)
    for change in changes:
        last = CPURecorder.last
        change()
        assert torch.equal(draw(model), eagerly(model)), change
        assert CPURecorder.last is not last


def test_few_graphs_are_kept_and_few_share_a_pool(on_cpu):
    model = Pointwise()
    for n in range(1, 21):
        draw(model, n)
    graphs = graph._of_network[model]
    assert len(graphs.kept) == kept.LIMIT
    assert CPURecorder.last.records == 20
    assert CPURecorder.last.pools == 3
    draw(model, 13)  # the oldest of those kept: now the last to go
    draw(model, 1)
    draw(model, 13)
    assert CPURecorder.last.records == 21


def test_graphs_are_freed_with_the_model_and_on_demand(on_cpu):
    model = Pointwise()
    draw(model)
    buffer = weakref.ref(_state(model))
    assert buffer() is not None
    draw(model, cuda_graph=False)
    gc.collect()
    assert buffer() is None
    draw(model)
    buffer, gone = weakref.ref(_state(model)), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert buffer() is None


def _state(model: Any) -> Any:
    (kept_graph,) = graph._of_network[model].kept.values()
    return kept_graph.step.x


def test_what_asks_the_device_for_a_number_runs_without_a_graph(on_cpu):
    class Asks(Pointwise):
        def forward(self, x, t, labels=None):
            return super().forward(x, t, labels) * (1 + float(x.mean()))

    model = Asks()
    with pytest.warns(RuntimeWarning, match="without a graph: the model asks the device for a number") as caught:
        got = draw(model, 7, batch_size=3)
    assert len(caught) == 1
    assert caught[0].filename.endswith("test_graph.py")
    assert torch.equal(got, eagerly(model, 7, batch_size=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(model, 4)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "there is not enough memory for it$"),
        (RuntimeError("CUDA error: no\nCUDA kernel"), "recording it failed with RuntimeError: CUDA error: no$"),
    ],
)
def test_a_recording_that_fails_leaves_the_run_as_it_was(on_cpu, error, reason):
    def fail(self, run, given, weights):
        run()  # halfway through: the state of the run must not have been touched
        raise error

    on_cpu.setattr(CPURecorder, "record", fail)
    model = Pointwise()
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        got = draw(model, name="dpmpp_3m", batch_size=2)
    assert len(caught) == 1
    assert torch.equal(got, eagerly(model, name="dpmpp_3m", batch_size=2))


def test_a_run_inside_a_run_and_beside_it_goes_without(on_cpu):
    model = Pointwise()
    expected, inner, threads = eagerly(model), [], []

    def callback(progress):
        if progress.step == 5:
            inner.append(draw(model, seed=9))
            thread = threading.Thread(target=lambda: inner.append(draw(model, seed=9)))
            thread.start()
            thread.join()
            threads.append(thread)

    for _ in range(2):
        assert torch.equal(draw(model, callback=callback), expected)
    assert len(inner) == 4
    for got in inner:
        assert torch.equal(got, eagerly(model, seed=9))
    assert CPURecorder.last.records == 1


def test_what_a_callback_is_given_stays(on_cpu):
    seen = []
    _, path = draw(Pointwise(), callback=lambda progress: seen.append(progress.x), trajectory=True)
    assert torch.equal(torch.stack(seen), path[1:])


def test_in_and_out_of_inference_mode(on_cpu):
    model = Pointwise()
    expected = eagerly(model)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert torch.equal(draw(model), expected)
    assert CPURecorder.last.records == 1


def test_auto_takes_what_is_long_and_surely_the_same(on_cpu, tiny):
    def records(model: Any, steps: int = 9) -> int:
        CPURecorder.last = CPURecorder(torch.device("cpu"))
        draw(model, steps=steps, shape=None if model is tiny else SHAPE, cuda_graph="auto")
        return CPURecorder.last.records

    assert records(Pointwise()) == 0  # not a network of diffkern
    draw(tiny, steps=graph.FEW - 1, shape=None, cuda_graph="auto")
    assert tiny not in graph._of_network  # calls of it are recorded, steps are not
    handle = tiny.conv_in.register_forward_hook(lambda *_: None)
    assert records(tiny) == 0
    handle.remove()
    with torch.autocast("cuda", enabled=False):
        assert records(tiny) == 1


def test_unrecorded_steps(on_cpu, tiny):
    CPURecorder.last = CPURecorder(torch.device("cpu"))
    with diffkern.unrecorded():
        out = draw(tiny, shape=None, cuda_graph="auto")
        assert CPURecorder.last.records == 0
        assert torch.equal(draw(tiny, shape=None, cuda_graph=True), out)
        assert CPURecorder.last.records == 1
    assert torch.equal(draw(tiny, shape=None, cuda_graph="auto"), out)
    assert CPURecorder.last.replays > 9  # by the graph that is there


def test_values_of_the_option():
    model = Pointwise()
    with pytest.raises(ValueError, match="cuda_graph=True needs a model on a CUDA device or a CPU, and this one is on"):
        draw(model.to("meta"))
    model = Pointwise()
    with pytest.raises(ValueError, match="cuda_graph must be True, False or 'auto', not 'always'"):
        draw(model, cuda_graph="always")
    assert torch.equal(draw(model, cuda_graph="auto"), draw(model, cuda_graph=False))

"""Recordings of the kernels of a CPU (diffkern/graphs/tape.py): that a replay does what a run does, whatever a network
does, or that there is none."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from folders import CONFIG
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffkern
from diffkern import packing
from diffkern.graphs.recorder import Recording, Refused, Watch, copied
from diffkern.graphs.tape import Recorder
from diffkern.models.unet import UNet2D
from diffkern.op import OPS

X = torch.linspace(-2, 3, 24).reshape(2, 3, 4)


@torch.no_grad()
def record(run: Callable[..., Any], *given: Tensor, weights: Sequence[Tensor] = ()) -> Recording:
    own = [copied(t) for t in given]

    def watched() -> Any:
        with Watch([*own, *weights], is_silent=True):
            return run(*own)

    return Recorder(torch.device("cpu")).record(watched, own, weights)


def written_through_a_view(x: Tensor) -> Tensor:
    y = torch.zeros(2, 3, 4)
    y[:, 1] = x[:, 0] + 1
    y.transpose(1, 2)[0].mul_(2)
    return y + y.sum()


def of_lists(x: Tensor) -> list[Tensor]:
    first, *others = x.split([1, 1, 1], dim=1)
    joined = torch.cat([*others, first], dim=1)
    return [torch.stack(joined.unbind(2)), *joined.chunk(2, dim=-1)]


def of_numbers(x: Tensor) -> Tensor:
    """Tensors made of Python's numbers, one of which is written to."""
    total = torch.tensor([0.5, 0.25])
    total += x.sum()
    return torch.cat([total, torch.arange(3, dtype=torch.float32) * total[0], torch.full((2,), 7.0)])


def by_name(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(torch.float64).sum(dim=1, keepdim=True), torch.clamp(x, max=0.5, min=-1).to(torch.bfloat16)


def one_freed_while_the_next_is_made(x: Tensor) -> Tensor:
    for i in range(50):
        x = x * 0.9 + i
    return x


def by_its_data(x: Tensor) -> Tensor:
    return x.data + (x * 2).data.detach()


def nested(x: Tensor) -> dict[str, Any]:
    return {"out": (x + 1, None, 3), "shape": tuple(x.shape), "same": x * 2}


@pytest.mark.parametrize(
    "run",
    [
        written_through_a_view,
        of_lists,
        of_numbers,
        by_name,
        one_freed_while_the_next_is_made,
        by_its_data,
        nested,
    ],
    ids=lambda run: run.__name__,
)
def test_a_replay_does_what_the_run_does(run: Callable[[Tensor], Any]) -> None:
    recording = record(run, X)
    for x in (X, 2 - X, X * X):
        for _ in range(2):
            torch.testing.assert_close(recording.replay([x]), run(x), rtol=0, atol=0)
    torch.testing.assert_close(recording.made, run(X), rtol=0, atol=0)


def test_what_is_made_on_the_way_is_freed_behind_its_last_reader() -> None:
    seen: list[int] = []

    made: list[weakref.ref[Tensor]] = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.append(weakref.ref(out))
            seen.append(sum(t() is not None for t in made))
            return out

    def run(x: Tensor) -> Tensor:
        for _ in range(20):
            x = torch.relu(x + 1)
        return x

    recording = record(run, X)
    with Counts():
        recording.replay([X])
    assert len(seen) == 40
    assert max(seen) == 2  # what is read, and what is made of it


def test_results_are_new_and_stay() -> None:
    weight = torch.ones(4)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return x, weight, x[0], weight.expand(2, 4), x + weight, weight.mul_(1)

    recording = record(run, X)
    first, second = recording.replay([X]), recording.replay([3 * X])
    for out, x in ((first, X), (second, 3 * X)):
        torch.testing.assert_close(out, (x, weight, x[0], weight.expand(2, 4), x + 1, weight), rtol=0, atol=0)
        assert out[3].stride() == (0, 1)
    places = [t.data_ptr() for t in (X, weight, *first, *second)]
    assert len(set(places)) == len(places)


def test_weights_are_read_where_they_lie_and_not_held() -> None:
    layer = nn.Linear(4, 4)
    given = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        recording = record(lambda x: layer(x) @ layer.weight.t(), given, weights=list(layer.parameters()))
        for _ in range(2):
            assert torch.equal(recording.replay([given]), layer(given) @ layer.weight.t())
            layer.weight.mul_(0.5)
            layer.bias.data += 1
    assert recording.hold()
    gone = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.zeros(4, 4))
    assert gone() is None
    assert not recording.hold()


@pytest.mark.parametrize("change", ["in place", "data", "dead"])
def test_a_recording_holds_as_long_as_its_packed_weights_do(change: str) -> None:
    layer: Any = nn.Linear(16, 24)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor) -> Tensor:  # a view of a weight, made anew, is packed too
        return diffkern.linear(diffkern.linear(x, layer.weight, layer.bias), layer.weight.t(), None)

    with torch.no_grad(), diffkern.use_backend("cpu"):
        expected = run(x)
        recording = record(run, x, weights=list(layer.parameters()))
        assert recording.hold()
        assert torch.equal(recording.replay([x]), expected)
        if change == "in place":
            layer.weight.mul_(2)
        elif change == "data":
            layer.weight.data += 1
        else:
            layer = nn.Linear(16, 24)
    assert not recording.hold()


@torch.no_grad()
def test_copies_of_weights_are_not_held() -> None:
    """Of weights that change again and again a recording that nobody replays would keep all it has seen."""
    layer = nn.Linear(16, 24)
    x = torch.ones(2, 5, 16)
    with diffkern.use_backend("cpu"):
        diffkern.linear(x, layer.weight, layer.bias)
        kept = packing.kept_bytes()
        recording = record(lambda x: diffkern.linear(x, layer.weight, layer.bias), x, weights=[*layer.parameters()])
        (copy,) = (weakref.ref(p.copy) for p in packing._kept.values() if p.weights[0].owner() is layer.weight)
        layer.weight.mul_(2)
        diffkern.linear(x, layer.weight, layer.bias)
    assert copy() is None
    assert packing.kept_bytes() == kept
    assert not recording.hold()


def _unseen(x: Tensor) -> Tensor:
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x))


READS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x * x.mean().item(), "the model asks the device for a number"),
    "float": (lambda x: x * float(x.mean()), "the model asks the device for a number"),
    "if": (lambda x: x if x.sum() > 0 else -x, "the model asks the device for a number"),
    "nonzero": (lambda x: x[x > 0], "the model asks the device for a number|the model makes"),
    "tolist": (lambda x: torch.tensor(x.tolist()), "the model reads a tensor's numbers"),
    "numpy": (lambda x: torch.from_numpy(x.numpy() + 1), "the model reads a tensor's numbers"),
    "dlpack of the input": (lambda x: _unseen(x) + 1, "the model makes a tensor in a way that"),
    "dlpack of what is made": (lambda x: _unseen(x * 2) + 1, "the model makes a tensor in a way that"),
}


@pytest.mark.parametrize("how", READS)
def test_what_a_replay_would_not_do_is_refused(how: str) -> None:
    run, reason = READS[how]
    with pytest.raises(Refused, match=reason):
        record(run, X)


def test_random_numbers_are_drawn_anew() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.dropout(x, 0.5, train=True) + torch.randn(x.shape)

    found = []
    for replayed in (False, True):
        torch.manual_seed(4)
        recording = record(run, X)
        found.append([recording.made, *(recording.replay([X]) if replayed else run(X) for _ in range(3))])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][1], found[0][2])


def test_a_recording_has_the_kernels_that_run_unseen() -> None:
    """No op of diffkern's, whose Python would choose again, and the same products, of packed weights."""
    torch.manual_seed(0)
    model = UNet2D(CONFIG).eval()
    args = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    with torch.no_grad():
        forward = functools.partial(inspect.unwrap(UNet2D.forward), model)
        expected = forward(*args)
        recording = record(forward, *args, weights=[*model.parameters()])
        assert torch.equal(recording.replay(args), expected)
    lines = recording.replay.lines  # type: ignore[attr-defined]
    names = {call._schema.name for call, *_ in lines if hasattr(call, "_schema")}
    assert {"diffkern_C::group_norm_silu", "diffkern_C::winograd", "diffkern_C::attention"} <= names
    assert not [name for name in names if name.startswith("diffkern::")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@torch.no_grad()
def test_every_op(op: Any, dtype: torch.dtype) -> None:
    """With another first argument in each replay, and what else it has read where it lies."""
    for sample in op.make_samples("cpu", dtype):
        if sample.workload:
            continue
        first, *others = op.bind(*sample.args())
        other = copied(first).copy_(first.flip(0))

        def call(x: Tensor, others: list[Any] = others) -> Any:
            return op(x, *others)

        call(first)  # packs
        recording = record(call, first)
        assert recording.hold()
        for x in (first, other):
            torch.testing.assert_close(recording.replay([x]), call(x), rtol=0, atol=0, equal_nan=True, msg=sample.name)

"""Calls of diffkern's own networks on a CPU, which are recorded and replayed: the bits of those that are not."""

from __future__ import annotations

import copy
import io
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from folders import CONFIG
from graphs import CPURecorder, counted, make_dit, make_prompted, table
from torch import Tensor, nn

import diffkern
from diffkern.graphs import calls
from diffkern.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from diffkern.models.unet import UNet2D

BEFORE = calls.BEFORE["auto"]
Call = Callable[[int], Any]


@pytest.fixture(autouse=True)
def _counted():
    CPURecorder.last = CPURecorder(torch.device("cpu"))
    with counted():
        yield


def picture(i: int, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(i))


def times(i: int) -> Tensor:
    return torch.tensor([3.0 + i, 700.0 - i])


def unet() -> tuple[Any, Call]:
    model = UNet2D(CONFIG).eval()
    return model, lambda i: model(picture(i), times(i), torch.tensor([i % 4, 3]))


def dit() -> tuple[Any, Call]:
    model = make_dit()
    return model, lambda i: model(picture(i), times(i), class_labels=torch.tensor([i % 4, 2]))


def prompted() -> tuple[Any, Call]:
    model, text = make_prompted()
    prompt = model.given(text)
    return model, lambda i: prompt(picture(i, 4), times(i))


def vae(part: str, channels: int) -> tuple[Any, Call]:
    config = AutoencoderKLConfig(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = AutoencoderKL(config).eval()
    call = {"decoder": model.decode, "encoder": lambda x: model.encode(x).mean}[part]
    return getattr(model, part), lambda i: call(picture(i, channels))


NETWORKS: dict[str, Callable[[], tuple[Any, Call]]] = {
    "UNet": unet,
    "DiT": dit,
    "prompted UNet": prompted,
    "VAE decoder": lambda: vae("decoder", 4),
    "VAE encoder": lambda: vae("encoder", 3),
}


def plain(call: Call, i: int) -> Any:
    with calls.unrecorded():
        return call(i)


def recordings(network: nn.Module) -> int:
    found = vars(network).get(calls.NAME)
    return 0 if found is None else sum(graph is not None for graph in found.graphs.kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_calls_with_other_numbers(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, call = NETWORKS[name]()
    network.to(dtype)
    if dtype is torch.bfloat16:
        small = picture
        monkeypatch.setitem(globals(), "picture", lambda *args: small(*args).bfloat16())
        monkeypatch.setattr("diffkern.models.autoencoder_kl.AutoencoderKL.dtype", dtype, raising=False)
    expected = [plain(call, i) for i in range(BEFORE + 4)]
    assert recordings(network) == 0
    found = [call(i) for i in range(BEFORE + 4)]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[-1], found[-2])
    assert (CPURecorder.last.records, CPURecorder.last.replays) == (1, 3)


@pytest.mark.parametrize("number", [int, lambda i: i + 0.5])
@torch.no_grad()
def test_a_timestep_that_is_a_number(number: Callable[[int], Any]) -> None:
    network, _ = unet()
    by_place: Call = lambda i: network(picture(i), number(i), torch.tensor([0, 3]))  # noqa: E731
    by_name: Call = lambda i: network(picture(i), timestep=number(i), class_labels=torch.tensor([0, 3]))  # noqa: E731
    for call in (by_place, by_name):
        for i in range(BEFORE + 3):
            assert torch.equal(call(i), plain(call, i))
    assert recordings(network) == 2
    assert CPURecorder.last.replays == 4


@torch.no_grad()
def test_what_changes_shows() -> None:
    network, call = unet()
    changes: dict[str, Callable[[], Any]] = {
        "a packed weight in place": lambda: network.conv_in.weight.mul_(1.5),
        "by its data": lambda: setattr(network.conv_out.weight, "data", network.conv_out.weight.data * 2),
        "a bias in place": lambda: network.conv_in.bias.add_(1),
        "a dict": lambda: network.load_state_dict({k: 1.1 * v for k, v in network.state_dict().items()}),
        "an assigned dict": lambda: network.load_state_dict(
            {k: 1.1 * v for k, v in network.state_dict().items()}, assign=True
        ),
        "an attribute": lambda: setattr(network.conv_norm_out, "eps", 0.5),
        "a module": lambda: setattr(network, "conv_norm_out", nn.GroupNorm(2, 8)),
    }
    last = None
    for what, change in changes.items():
        for i in range(BEFORE + 2):
            assert torch.equal(call(i), plain(call, i)), what
        change()
        out = call(0)
        assert torch.equal(out, plain(call, 0)), what
        assert last is None or not torch.equal(out, last), what
        last = out


def test_training_is_as_it_was() -> None:
    network, call = unet()
    with torch.no_grad():
        for i in range(BEFORE + 2):
            call(i)
    call(0).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        assert torch.equal(call(1), plain(call, 1))
    assert recordings(network) == 1


@torch.no_grad()
def test_copies_have_recordings_of_their_own() -> None:
    network, call = unet()
    for i in range(BEFORE + 1):
        call(i)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    args, own = (picture(9), times(9), torch.tensor([9 % 4, 3])), call(9)
    for other in (copy.deepcopy(network), copy.copy(network), torch.load(file, weights_only=False)):
        # Of all that a shallow copy has only its attributes are its own.
        other.config = replace(other.config, flip_sin_to_cos=not other.config.flip_sin_to_cos)
        for _ in range(BEFORE + 2):
            with calls.unrecorded():
                want = other(*args)
            assert torch.equal(other(*args), want)
        assert recordings(other) == 1
        assert not torch.equal(want, own)
        assert torch.equal(call(9), own)


@torch.no_grad()
def test_a_network_goes_with_its_last_reference() -> None:
    network, call = unet()
    for i in range(BEFORE + 2):
        call(i)
    gone = weakref.ref(network.conv_in.weight)
    del network, call
    assert gone() is None


@torch.no_grad()
def test_threads() -> None:
    network, call = unet()
    expected = [plain(call, i) for i in range(8)]
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(10) for i in range(8) if not torch.equal(call(i), expected[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recordings(network) == 1


def test_where_nothing_is_recorded() -> None:
    network, call = unet()
    with torch.no_grad():
        for _ in range(2):
            diffkern.sample(network, table(steps=9), 2, labels=1, null_label=3, cuda_graph=False)
        assert recordings(network) == 0
        with torch.autocast("cpu", torch.bfloat16):
            for i in range(BEFORE + 2):
                call(i)
        assert recordings(network) == 0
        network.requires_grad_(False)
        traced = torch.jit.trace(lambda x: network(x, times(0), torch.tensor([0, 3])), (picture(1),), check_trace=False)
        assert torch.equal(traced(picture(2)), network(picture(2), times(0), torch.tensor([0, 3])))


@torch.no_grad()
def test_a_compiled_network() -> None:
    network, call = dit()
    compiled = torch.compile(network, backend="eager")
    for i in range(BEFORE + 2):
        got = compiled(picture(i), times(i), class_labels=torch.tensor([i % 4, 2]))
        torch.testing.assert_close(got, plain(call, i))

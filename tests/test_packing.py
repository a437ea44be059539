"""A packed weight is never older than its weight, and dies with it; training and inference mode keep none."""

from __future__ import annotations

import copy
import gc
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern import packing
from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.testing import make

pytestmark = pytest.mark.skipif(availability("cpu") is not None, reason="packs for the cpu backend")

X = make((3, 5, 16), "cpu", torch.float32)


@pytest.fixture(autouse=True)
def cpu():
    with torch.no_grad(), use_backend("cpu"):
        yield


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 12)


def right(m: nn.Linear) -> bool:
    got = diffkern.linear(X, m.weight, m.bias)
    return torch.allclose(got, nn.functional.linear(X, m.weight, m.bias), atol=1e-5)


def halve(m: nn.Linear) -> None:
    m.weight.mul_(0.5)


def load(m: nn.Linear) -> None:
    m.load_state_dict(nn.Linear(16, 12).state_dict())


def assign(m: nn.Linear) -> None:
    m.load_state_dict(nn.Linear(16, 12).state_dict(), assign=True)


def swap(m: nn.Linear) -> None:
    m.weight.data = torch.randn(12, 16)


def merge(m: nn.Linear) -> None:
    """As peft merges a LoRA: PyTorch counts no change of what is reached through `.data`."""
    version = m.weight._version
    m.weight.data += torch.randn(12, 2) @ torch.randn(2, 16)
    assert m.weight._version == version


def step(m: nn.Linear) -> None:
    with torch.enable_grad():
        diffkern.linear(X, m.weight, m.bias).square().sum().backward()
    torch.optim.SGD(m.parameters(), lr=0.1).step()


def transpose(m: nn.Linear) -> None:
    """The same memory, read in another order: rows of 12 become columns of 12."""
    m.weight.data = m.weight.data.view(16, 12).T


def narrow(m: nn.Linear) -> None:
    m.weight.data = m.weight.data.bfloat16().float()


CHANGES = [halve, load, assign, swap, merge, step, transpose, narrow]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_shows_in_the_next_call(change):
    m = layer()
    assert right(m)
    before = m.weight.clone()
    change(m)
    assert not torch.equal(m.weight, before)
    assert right(m)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_of_one_weight_of_three_shows_in_the_next_call(change, which):
    layers = [nn.Linear(16, 12) for _ in range(3)]

    def right_together() -> bool:
        got = diffkern.query_key_value(X, *(m.weight for m in layers), *(m.bias for m in layers))
        return torch.allclose(got, torch.stack([m(X) for m in layers], -2), atol=1e-5)

    assert right_together()
    kept = packing.kept_bytes()
    change(layers[which])
    assert right_together()
    if change not in (step, assign):  # those pack a weight of their own, or give the layer another
        assert packing.kept_bytes() == kept


def test_one_copy_of_three_weights_is_freed_with_any_of_them():
    gc.collect()
    before = packing.kept_bytes()
    layers = [nn.Linear(16, 16, bias=False) for _ in range(3)]  # whole vectors: a copy has no zeros
    for _ in range(2):
        diffkern.query_key_value(X, *(m.weight for m in layers))
        assert packing.kept_bytes() == before + 3 * 16 * 16 * 4
    twice = diffkern.query_key_value(X, layers[0].weight, layers[0].weight, layers[2].weight)
    torch.testing.assert_close(twice[..., 1, :], layers[0](X))
    del layers[2]
    gc.collect()
    assert packing.kept_bytes() == before


def test_a_copy_is_made_once_and_freed_with_its_weight():
    gc.collect()
    before = packing.kept_bytes()
    m = nn.Linear(16, 16)  # whole vectors: a copy has no zeros
    copies = [packing.packed([m.weight], "test", m.weight.clone) for _ in range(3)]
    assert copies[0] is copies[1] is copies[2]
    del copies
    assert right(m)
    assert packing.kept_bytes() == before + 2 * m.weight.numel() * 4
    twin = copy.deepcopy(m)  # has copies of its own
    halve(twin)
    assert right(twin)
    assert right(m)
    del m, twin
    gc.collect()
    assert packing.kept_bytes() == before


def test_a_weight_of_inference_mode_is_never_kept():
    with torch.inference_mode():
        m = layer()
        before = packing.kept_bytes()
        assert right(m)
        halve(m)
        assert right(m)
    assert packing.kept_bytes() == before


def test_no_copy_is_kept_if_told_so(monkeypatch):
    monkeypatch.setenv("DIFFKERN_PACK", "0")
    packing._keeps.cache_clear()
    before = packing.kept_bytes()
    m = layer()
    assert right(m)
    assert packing.kept_bytes() == before
    packing._keeps.cache_clear()


def test_prepare_packs_before_the_first_call():
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return diffkern.linear(x, self.weight, self.bias)

    before = packing.kept_bytes()
    m = diffkern.prepare(Layer(16, 12), X)
    assert packing.kept_bytes() > before
    kept = packing.kept_bytes()
    m(X)
    assert packing.kept_bytes() == kept


def test_training_packs_nothing():
    m = layer()
    before = packing.kept_bytes()
    with torch.enable_grad():
        y = diffkern.linear(X, m.weight, m.bias)
    assert y.requires_grad
    assert packing.kept_bytes() == before


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("channels", [4, 32], ids=["oneDNN", "Winograd"])
def test_a_convolution_sees_a_change(channels, upsample):
    m = nn.Conv2d(channels, 6, 3, padding=1)
    x = make((2, channels, 5, 5), "cpu", torch.float32, "channels_last")
    for change in (lambda: None, lambda: m.weight.mul_(0.5), lambda: m.weight.data.add_(0.1)):
        change()
        big = nn.functional.interpolate(x, scale_factor=2.0) if upsample else x
        got = diffkern.conv2d(x, m.weight, m.bias, upsample=upsample)
        assert torch.allclose(got, m(big), atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_views_of_a_weight_are_known_by_the_weight(mode):
    """As of a convolution whose input comes in two parts: each call slices the weight anew."""

    def check(m: nn.Linear) -> int:
        with mode():
            for part in (m.weight[:, :8], m.weight[:, 8:]):
                torch.testing.assert_close(diffkern.linear(X[..., :8], part), X[..., :8] @ part.T)
        return packing.kept_bytes()

    gc.collect()  # what other tests have left
    before, m = packing.kept_bytes(), layer()
    kept = check(m)
    assert kept > before
    assert check(m) == kept  # the same copies, though the views are new
    halve(m)
    assert check(m) == kept
    del m
    gc.collect()
    assert packing.kept_bytes() == before


FRESH = """
import resource
import torch
import diffkern

layer = torch.nn.Linear(16, 12)
with torch.no_grad(), diffkern.use_backend("cpu"):
    diffkern.linear(torch.randn(1, 4, 16), layer.weight, layer.bias)
def pages():  # that a call writes for the first time, which has six results of 6 MB at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    results = [torch.ones(3 << 19) for _ in range(6)]
    del results
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(pages() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc returns memory")
def test_freed_memory_is_kept_for_the_next_call():
    """In a process of its own: in this one other tests have freed as much."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    assert min(later) < first / 10  # all are 0, unless something small came to lie between two results

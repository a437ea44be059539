"""A weight that safetensors maps from a file takes no memory once it is packed, and no change of it is lost."""

from __future__ import annotations

import gc
import struct
import sys
from pathlib import Path

import pytest
import torch
from folders import write_tiny
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import diffkern
from diffkern import packing
from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.models.folder import WEIGHTS
from diffkern.testing import make

pytestmark = [
    pytest.mark.skipif(availability("cpu") is not None, reason="packs for the cpu backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about pages"),
]

N = 512  # a weight of 1 MiB
X = make((3, 5, N), "cpu", torch.float32)
PAGE = 4096


@pytest.fixture(autouse=True)
def cpu():
    with torch.no_grad(), use_backend("cpu"):
        yield


def values(seed: int = 0) -> Tensor:
    return make((N, N), "cpu", torch.float32, seed=seed) / N**0.5


def from_file(path: Path, seed: int = 0) -> nn.Linear:
    save_file({"before": torch.zeros(1000), "weight": values(seed), "after": torch.zeros(5000)}, path)
    with safe_open(path, framework="pt") as weights, torch.device("meta"):
        m = nn.Linear(N, N, bias=False)
        m.weight = nn.Parameter(weights.get_tensor("weight"))
    return m


def maps(path: Path) -> list[tuple[int, int]]:
    """The addresses at which a file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [(int(begin, 16), int(end, 16)) for begin, end in (line[0].split("-") for line in lines)]


def resident(t: Tensor) -> int:
    """How many of the pages that lie wholly in a tensor are in memory."""
    first, last = -(-t.data_ptr() // PAGE), (t.data_ptr() + t.nbytes) // PAGE
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        entries = struct.unpack(f"{last - first}Q", pagemap.read(8 * (last - first)))
    return sum(entry >> 63 for entry in entries)


def right(m: nn.Linear) -> bool:
    got = diffkern.linear(X, m.weight)
    return torch.allclose(got, nn.functional.linear(X, m.weight.clone()), atol=1e-5)


def test_a_packed_weight_of_a_file_takes_no_memory(tmp_path):
    m = from_file(tmp_path / "a.safetensors")
    expected = nn.functional.linear(X, m.weight)
    assert resident(m.weight) >= 255
    for _ in range(2):
        torch.testing.assert_close(diffkern.linear(X, m.weight), expected)
        assert resident(m.weight) == 0
    assert torch.equal(m.weight, values())
    assert resident(m.weight) >= 255
    mine = nn.Parameter(m.weight.clone())
    torch.testing.assert_close(diffkern.linear(X, mine), expected)
    assert resident(mine) >= 255


def test_parts_of_a_weight_are_given_back(tmp_path):
    m = from_file(tmp_path / "a.safetensors")
    for part, x in zip(m.weight.split([200, 312], dim=1), X.split([200, 312], dim=2), strict=True):
        expected = nn.functional.linear(x, part)
        torch.testing.assert_close(diffkern.linear(x, part), expected)
    assert resident(m.weight) == 0


def one_value(m: nn.Linear) -> None:
    """One that the fingerprint of a weight in memory does not read."""
    before = torch.ops.diffkern_C.fingerprint(m.weight, False)
    m.weight.data[300, 301] += 100.0
    assert torch.ops.diffkern_C.fingerprint(m.weight, False) == before


def merge(m: nn.Linear) -> None:
    m.weight.data += values(1)[:, :2] @ values(2)[:2]


def load(m: nn.Linear) -> None:
    m.load_state_dict({"weight": values(3)})


def swap(m: nn.Linear) -> None:
    m.weight.data = values(4)


@pytest.mark.parametrize("change", [one_value, merge, load, swap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("calls", [0, 1])
def test_a_change_is_seen_and_kept(tmp_path, change, calls):
    m = from_file(tmp_path / "a.safetensors")
    for _ in range(calls):
        assert right(m)
    change(m)
    changed = m.weight.clone()
    assert right(m)
    assert torch.equal(m.weight, changed)
    m.weight.data *= -1.0
    assert right(m)


def test_a_change_while_packing_is_kept(tmp_path):
    m, packs = from_file(tmp_path / "a.safetensors"), 0

    def pack() -> Tensor:
        nonlocal packs
        packs += 1
        copy = m.weight.clone()
        if packs == 1:
            m.weight.data[300, 301] = 7.0
        return copy

    for _ in range(3):
        copy = packing.packed([m.weight], "test", pack)
    assert m.weight[300, 301] == copy[300, 301] == 7.0
    assert packs == 2


def test_another_file_at_the_same_address_is_another_weight(tmp_path):
    m = from_file(tmp_path / "a.safetensors")
    assert right(m)
    m.weight.data = torch.zeros(1)  # what is mapped last comes where there is room again
    m.weight.data = from_file(tmp_path / "b.safetensors", seed=5).weight.data
    assert right(m)


def test_a_file_that_is_written_to_by_others_is_compared_by_its_values(tmp_path):
    file = str(tmp_path / "weight")
    ours, theirs = (torch.from_file(file, shared=True, size=N * N).view(N, N) for _ in range(2))
    theirs.copy_(values())
    assert not torch.ops.diffkern_C.of_a_file(ours)
    m = from_file(tmp_path / "a.safetensors")
    m.weight = nn.Parameter(ours)
    assert right(m)
    theirs.mul_(0.5)
    assert right(m)


def test_the_file_is_let_go_with_the_weight(tmp_path):
    m = from_file(tmp_path / "a.safetensors")
    assert right(m)
    assert maps(tmp_path / "a.safetensors")
    del m
    gc.collect()
    assert not maps(tmp_path / "a.safetensors")


def test_a_folder_is_read_where_it_is_mapped(tmp_path):
    write_tiny(tmp_path)
    unet = diffkern.UNet2D.from_folder(tmp_path)
    inside = maps(tmp_path / WEIGHTS)
    assert inside
    for p in unet.parameters():
        assert any(begin <= p.data_ptr() < end for begin, end in inside)
    elsewhere = diffkern.UNet2D.from_folder(tmp_path, device="meta")
    assert elsewhere.conv_in.weight.stride() == (27, 1, 9, 3)

"""The norm that takes the moments of a picture in place of reading it once more, and networks that ask for them. On a
GPU, else in Triton's interpreter."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern.available import availability
from diffkern.backend import use_backend
from diffkern.models.autoencoder_kl import AutoencoderKLConfig
from diffkern.models.unet import UNet2DConfig
from diffkern.op import OPS
from diffkern.ops.conv2d_moments import moments_of
from diffkern.testing import check, judge, make

if (reason := availability("triton")) is not None:
    pytest.skip(reason, allow_module_level=True)

from diffkern.kernels import configs, conv2d_moments

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def asked(yes: int = 1) -> Iterator[None]:
    """While it lasts, networks ask for moments, or do not."""
    with configs.trying(lambda kernel, key: {"MOMENTS": yes} if kernel == "conv2d_moments" else None):
        yield


@pytest.fixture
def in_two_passes(monkeypatch):
    """What is small is normalised as what is large."""
    module = importlib.import_module("diffkern.kernels.group_norm_silu")
    monkeypatch.setattr(module, "at_once", lambda *sizes: None)


def test_the_norm_takes_the_moments_that_it_is_given(in_two_passes):
    """Where these say that it is normalised already, it is left as it is."""
    x = make((2, 12, 5, 7), DEVICE, torch.float32, "channels_last") * 3 + 4
    moments = torch.tensor([0.0, 35.0], device=DEVICE).repeat_interleave(12).expand(2, 1, 24)
    with use_backend("triton"):
        y = diffkern.group_norm_silu(x, 3, silu=False, moments=moments)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("per_group", "pixels", "chunks"), [(1, (37, 30), 1050), (96, (9, 5), 37), (1040, (3, 2), 3)])
def test_every_cut_of_the_pool(in_two_passes, per_group, pixels, chunks):
    """Groups of one channel, of no power of two, and wider than a program's tile; more chunks than it reads at once."""
    groups = 1 if per_group > 1 else 2
    x = make((2, groups * per_group, *pixels), DEVICE, torch.float32, "channels_last") * 3 + 40
    args = OPS["group_norm_silu"].bind(x, groups, moments=moments_of(x, chunks))
    check(OPS["group_norm_silu"], "triton", args)


UNET = UNet2DConfig(
    sample_size=12, block_out_channels=(8, 16), layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8,
)  # fmt: skip
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)  # fmt: skip


def network(name: str) -> tuple[Any, tuple[Tensor, ...], Any]:
    """A network, the batch that it is called with, and the call."""
    torch.manual_seed(0)
    made: Any = diffkern.AutoencoderKL(VAE) if name == "VAE" else diffkern.UNet2D(UNET)
    for p in made.parameters():  # biases and affine parameters that matter
        nn.init.normal_(p, std=0.2) if p.dim() < 2 else None
    made = made.to(DEVICE, memory_format=torch.channels_last).eval()
    if name == "VAE":
        return made, (make((2, 4, 6, 6), DEVICE, torch.float32),), made.decode
    return made, (make((2, 3, 12, 12), DEVICE, torch.float32), torch.tensor([3.0, 700.0], device=DEVICE)), made


@pytest.mark.parametrize(("name", "norms", "given"), [("UNet2D", 21, 9), ("VAE", 14, 7)])
@torch.no_grad()
def test_a_whole_network_with_moments(in_two_passes, monkeypatch, name, norms, given):
    """As one op is judged; and which of its norms are given moments: not those behind a convolution whose bias the norm
    adds, nor those that join what has none, as the result of an attention."""
    made, args, call = network(name)
    kernels = importlib.import_module("diffkern.kernels.group_norm_silu")
    plain_kernel, taken = kernels.group_norm_silu, []

    def counting(*args: Any) -> Tensor:
        taken.append(args[-2] is not None)  # the last two: of x and of skip
        return plain_kernel(*args)

    monkeypatch.setattr(kernels, "group_norm_silu", counting)
    with asked(), use_backend("triton"):
        got = call(*args)
    assert (len(taken), sum(taken)) == (norms, given)
    with use_backend("reference"):
        plain = call(*args)
        made.double()
        exact = call(*(a.double() for a in args))
    judge(name, (got,), (plain,), (exact,))
    assert exact.std() > 0.01, "an output of zeros would prove nothing"


@torch.no_grad()
def test_a_sample_alone_equals_itself_in_a_batch(in_two_passes):
    _, args, call = network("UNet2D")
    with asked(), use_backend("triton"), diffkern.batch_invariant():
        whole, last = call(*args), call(*(a[1:] for a in args))
    assert torch.equal(whole[1:], last)


def test_no_moments_where_nothing_was_measured_and_where_it_trains(monkeypatch):
    x, n = make((1, 8, 8, 8), DEVICE, torch.bfloat16, "channels_last"), 16
    on_gpu: Any = SimpleNamespace(element_size=lambda: 2, shape=(1, 8, 8, 8), is_cuda=True, device=torch.device("cpu"))
    entry = {"shape": {"MOMENTS": 1}, "us": 9.0, "torch_us": 10.0}
    key = "bytes 2, pixels 64, channels 16"
    tables = {80: {"conv2d_moments": {key: entry}}}
    monkeypatch.setattr(configs, "_table", lambda arch: tables.get(arch, {}))
    conv2d_moments._found.cache_clear()
    try:
        assert conv2d_moments.facts(2, 50, n) == key
        assert conv2d_moments.pays(on_gpu, n, 1, False)
        assert not conv2d_moments.pays(on_gpu, n, 1, True), "another size"
        assert not conv2d_moments.pays(make((1, 8, 8, 8), "cpu", torch.bfloat16), n, 1, False), "a CPU"
        entry["shape"] = {"MOMENTS": 0}
        conv2d_moments._found.cache_clear()
        assert not conv2d_moments.pays(on_gpu, n, 1, False), "measured as slower"
    finally:
        conv2d_moments._found.cache_clear()
    conv = nn.Conv2d(8, n, 3, padding=1, device=DEVICE, dtype=torch.bfloat16)
    from diffkern.models.blocks import picture

    with asked():
        assert picture(conv, x).moments is None, "it trains"
        with torch.no_grad():
            assert picture(conv, x).moments is not None
    with torch.no_grad():
        assert picture(conv, x).moments is None

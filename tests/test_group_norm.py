"""group_norm_silu in channels_last on the CPU, where its sums and its SiLU take a way of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffkern.op import OPS
from diffkern.testing import check, make, ulp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OP = OPS["group_norm_silu"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_any_number(dtype, cpu):
    """What a weight of zero leaves is the SiLU of the bias."""
    z = torch.cat([torch.linspace(-30, 30, 1531), torch.logspace(-30, 4, 500), -torch.logspace(-30, 1.9, 505)])
    edges = torch.tensor([0.0, -0.0, -87.0, -88.5, -89.0, -95.0, -104.0, -200.0, -1e38, 1e38, torch.inf, torch.nan])
    z = torch.cat([edges, z, z[:12]]).unsqueeze(0)
    x = make((1, z.shape[1], 1, 2), "cpu", dtype, "channels_last")
    y = OP(x, 1, torch.zeros(z.shape[1]), z[0])[..., 0, 0]
    expected = F.silu(z.double())
    finite = expected.to(dtype).isfinite()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isfinite(), finite)
    # Half a unit is the rounding; float32 rounds on the way too. e^88.7 is the largest power in float32.
    units = 2.5 if dtype is torch.float32 else 0.55
    error = (y.double() - expected).abs() - 1e-36
    assert (error[finite] <= units * ulp(expected, dtype)[finite]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_a_mean_far_from_the_first_guess(dtype, add, cpu):
    """The mean is guessed from 16 places, which here are unlike all others."""
    x = make((1, 2, 256, 256), "cpu", dtype, "channels_last")
    pixels = x.permute(0, 2, 3, 1).view(-1, 2)
    for place in range(16):
        pixels[place * 4096 : place * 4096 + 16] += 5000
    added = torch.tensor([[300.0, -700.0]]) if add else None
    check(OP, "cpu", (x, 1, None, None, 1e-5, True, added, None, None, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(6, 0), (34, 0), (64, 0), (96, 0), (33, 31), (32, 64), (2, 94)])
def test_blocks_of_every_length(channels, dtype, cpu):
    """Whole blocks, two at a time or one, and what is left over of a row, of a pixel, and of a picture."""
    own, rest = channels
    for size in ((1, 1), (3, 5), (9, 37)):
        x = make((2, own, *size), "cpu", dtype, "channels_last") + 0.5
        skip = make((2, rest, *size), "cpu", dtype, "channels_last", seed=1) if rest else None
        weight, added = make((own + rest,), "cpu", dtype, seed=2), make((2, own + rest), "cpu", dtype, seed=3)
        for more in (None, added):
            check(OP, "cpu", (x, 2, weight, weight, 1e-5, True, more, None, None, skip))

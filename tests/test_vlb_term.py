"""The terms of a variational bound are what they say: masses that sum to 1, right to the last digits in the tails, the
KL and the densities of torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import diffkern
from diffkern.backend import use_backend
from diffkern.ops.vlb_term import BIN, C1, CLIP, K0, LOGVAR_MAX, LOGVAR_MIN, VAR, WIDTH, A, B


def term(x0: Tensor, mean: Tensor, row: dict[int, float], v: Tensor | None = None) -> Tensor:
    """The term of each element, in the dtype of x0: x0_hat is the model's output as it is."""
    full = {A: 0.0, B: 1.0, CLIP: math.inf} | row
    table = torch.tensor([[full.get(i, 0.0) for i in range(WIDTH)]], dtype=x0.dtype)
    output = mean[:, None] if v is None else torch.stack([mean, v], 1)
    return diffkern.vlb_term(x0[:, None], x0[:, None], output, table, torch.zeros(len(x0), dtype=torch.int64))


def decoder(deviation: float, width: float = 1 / 255) -> dict[int, float]:
    return {LOGVAR_MIN: 2 * math.log(deviation), LOGVAR_MAX: 2 * math.log(deviation), BIN: width}


@pytest.mark.parametrize("deviation", [1e-4, 2e-3, 0.01, 0.03, 0.2, 1.0, 30.0])
def test_the_masses_of_all_levels_sum_to_one(backend, deviation):
    count = 16 if backend == "triton" else 256  # the interpreter takes long
    levels = 2 * torch.arange(count) / (count - 1) - 1
    means = (-1.0, 0.2013) if backend == "triton" else (-3.0, -1.0, -0.9961, 0.0, 0.2013, 1.0)
    for mean in means:
        nll = term(levels, torch.full((count,), mean), decoder(deviation, 1 / (count - 1)))
        # at 1e-4 float32 knows where a level lies to 1e-3 of a deviation only
        assert abs(torch.exp(-nll.double()).sum().item() - 1) < (1e-3 if deviation < 1e-3 else 2e-5)


# From mpmath with 80 digits: x0, x0_hat, half width, deviation, the term. In order: far off, twice; hopeless; a narrow
# bin near the mean, far from it, at it; a wide one that misses little; both ends, in reach and not; where both begin.
TAILS = [
    (0, 0.5, 2**-8, 2**-5, 129.71362439927728),
    (0, 0.5, 2**-8, 2**-7, 2021.1952262860265),
    (-0.5, 1, 2**-8, 2**-13, 75104778.332709432),
    (0.25, 0.3125, 2**-8, 0.5, 5.0856441301045734),
    (0.25, -2, 2**-12, 0.5, 17.975409573878006),
    (0.25, 0.25, 2**-12, 8, 10.622999061199128),
    (0, 0.125, 0.3125, 2**-6, 1.776482112077679e-33),
    (-1, -1.125, 2**-8, 2**-6, 7.9197263146424777e-17),
    (1, 1.25, 2**-8, 2**-5, 2.2368120644441053e-16),
    (-1, 0.5, 2**-8, 2**-6, 4589.5120382058385),
    (1, 0, 2**-8, 2**-4, 130.69346541169561),
    (1, 1, 2**-8, 2**-9, 0.023012909328963488),
    (0.5, 0.25, 0.5, 0.5, 0.36894641528865639),
    (-0.5, -0.25, 0.5, 0.5, 0.36894641528865639),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", TAILS)
def test_the_tails_are_right_to_the_last_digits(backend, case, dtype):
    x0, mean, width, deviation, exact = case
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("kernels take no float64")
    one = torch.tensor([x0], dtype=dtype)
    logvar = torch.tensor(2 * math.log(deviation), dtype=dtype)  # whose rounding moves the deviation
    moved = abs(math.exp((logvar.item() - 2 * math.log(deviation)) / 2) - 1)
    row = {LOGVAR_MIN: 2 * math.log(deviation), LOGVAR_MAX: 2 * math.log(deviation), BIN: width}
    got = term(one, torch.full_like(one, mean), row).double().item()
    slope = 1 + ((abs(x0 - mean) + width) / deviation) ** 2  # d log(term) / d log(deviation) is no larger than this
    near = abs(got - exact) / exact
    allowed = 8 * torch.finfo(dtype).eps + 2 * moved
    assert near <= allowed * (slope if exact < 1 else 1 + 1 / exact), f"{got}, exactly {exact}"


def normals(n: int, draw: int) -> Tensor:
    return diffkern.randn(diffkern.noise_keys(3, 1), [n], draw)[0]


@pytest.mark.parametrize("learned", [False, True])
def test_the_kl_is_that_of_two_normals(backend, learned):
    """Of the posterior C1 x0 + c x_t and the model's, which differ by C1 (x0 - x0_hat); of every size of variance."""
    x0, mean, v = (normals(12, draw) for draw in range(3))
    for true, low, high in ((1e-4, 1e-4, 2e-4), (0.02, 0.02, 0.0201), (3.0, 0.5, 9.0)):
        row = {C1: 0.7, K0: -1 - math.log(true), VAR: true, LOGVAR_MIN: math.log(low), LOGVAR_MAX: math.log(high)}
        share = (v.double() + 1) / 2 if learned else torch.ones(12, dtype=torch.float64)
        deviation = torch.exp((share * math.log(high) + (1 - share) * math.log(low)) / 2)
        exact = kl_divergence(Normal(0.7 * x0.double(), math.sqrt(true)), Normal(0.7 * mean.double(), deviation))
        got = term(x0, mean, row, v if learned else None)
        # K0 and the logarithms are float32 of up to 10: half a unit is 5e-7 of every part
        torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=1e-6)


def test_the_density_is_that_of_a_normal(backend):
    x0, mean = normals(12, 0), normals(12, 1)
    row = {C1: 1.0, K0: math.log(2 * math.pi), LOGVAR_MIN: math.log(0.3), LOGVAR_MAX: math.log(0.3)}
    exact = -Normal(mean.double(), math.sqrt(0.3)).log_prob(x0.double())
    torch.testing.assert_close(term(x0, mean, row).double(), exact, rtol=2e-6, atol=1e-6)


def test_a_term_is_the_sum_over_its_elements(backend):
    x0, mean = normals(3000, 0).clamp(-1, 1), normals(3000, 1)
    row = decoder(0.1)
    table = torch.tensor([[{A: 0.0, B: 1.0, CLIP: 1.0, **row}.get(i, 0.0) for i in range(WIDTH)]])
    shape, zero = (1, 3, 20, 50), torch.zeros(1, dtype=torch.int64)
    whole = diffkern.vlb_term(x0.reshape(shape), x0.reshape(shape), mean.reshape(shape), table, zero)
    with use_backend("reference"):
        apart = term(x0.double(), mean.double().clamp(-1, 1), row).sum()
    assert abs(whole.item() / apart.item() - 1) < 1e-6


@pytest.mark.parametrize("row", [decoder(0.01), decoder(1e-4), decoder(5.0), {C1: 0.5, K0: 3.0, VAR: 0.02}])
def test_gradients_are_finite_and_those_of_finite_differences(row):
    """Each case of a bin in one batch: what an element does not take must not make its gradient NaN."""
    x0 = torch.tensor([-1.0, -1.0, 1.0, 0.0, 0.0, 0.25, 0.25], dtype=torch.float64)
    mean = torch.tensor([-1.01, 0.4, 0.9, 1e-3, 0.5, 0.2501, -1.5], dtype=torch.float64, requires_grad=True)
    v = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    spread = row | {LOGVAR_MIN: row.get(LOGVAR_MIN, -4.0) - 0.5}

    def scaled(mean: Tensor, v: Tensor) -> Tensor:
        return term(x0, mean, {LOGVAR_MAX: -4.0} | spread, v).log1p()  # some are 1e8, of which no difference is left

    assert torch.autograd.gradcheck(scaled, (mean, v), eps=1e-7, atol=1e-5, rtol=1e-4)

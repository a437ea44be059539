"""Fixtures: each backend that runs on CPU tensors here, and the C++ one alone."""

from __future__ import annotations

import pytest

from diffkern.available import availability, triton_interpreted
from diffkern.backend import use_backend

BACKENDS = ("cpu", "triton", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if (reason := availability(request.param)) is not None:
        pytest.skip(reason)
    if request.param == "triton" and not triton_interpreted():
        pytest.skip("runs on GPU tensors; the samples here are on the CPU")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def cpu():
    if (reason := availability("cpu")) is not None:
        pytest.skip(reason)
    with use_backend("cpu"):
        yield

"""The ops that have a Triton kernel, and calls of it: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffkern.backend import use_backend
from diffkern.op import OPS, Sample
from diffkern.testing import tensors

KERNELS = sorted(name for name, op in OPS.items() if any(b.name == "triton" for b in op.backends))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="looks inside Triton's interpreter")


def run(name: str, *args: object) -> tuple[Tensor, ...]:
    with use_backend("triton"):
        return tensors(OPS[name](*args))


def small(name: str, dtype: torch.dtype) -> list[Sample]:
    samples = OPS[name].make_samples
    assert samples is not None
    return [s for s in samples(DEVICE, dtype) if not s.workload]

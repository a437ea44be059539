"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported. With
one, `python -m pytest -m "gpu or device"` runs what is tested on it."""

import importlib.util
import os

# The threads of one process wait for each other spinning, which is most of the time of small calls where another
# process has the core: such as the other half of `-n auto`. Asked for before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

pytest_plugins = ["builds", "backends", "disks", "likelihood_runs", "shards"]  # their fixtures

if torch.cuda.is_available():
    # The error that a kernel may make is measured by PyTorch's own, which here must not round to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
elif importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"

    import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported."""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"

    import interpreter

    interpreter.install()

"""What the commands that run a model have in common: its dtype, its device, and which backends its ops take."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from diffkern import doctor
from diffkern.backend import BACKENDS
from diffkern.models.bundle import Diffusion, bundled
from diffkern.op import OPS
from diffkern.ranks import gpu_of_this_process

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="emoji-32", help=f"{', '.join(bundled())}, or a diffusers folder")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The arguments that say on what, and how, a model runs."""
    parser.add_argument("--dtype", default="float32", metavar="NAME", help=f"{', '.join(DTYPES)} (default float32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--backend", default="auto", metavar="NAME", help=f"auto, {', '.join(BACKENDS)}")


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError, naming the choices, for another name."""
    if name not in DTYPES:
        raise ValueError(f"no dtype is named {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """Without a number a GPU is the process's own, one for each that torchrun starts on a host. Raises ValueError,
    naming the devices here, for another name, and for a process that none is left for."""
    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name in ("auto", "cuda") and len(have) > 1:
        return torch.device("cuda", gpu_of_this_process(len(have) - 1))
    if name == "auto":
        return torch.device("cpu")
    if name not in have:
        raise ValueError(f"no device is named {name!r} here: choose one of auto, {', '.join(have)}")
    return torch.device(name)


def at_least(low: int, **values: int) -> None:
    """Raise ValueError for an argument that is less. values: by the name of the option."""
    for name, value in values.items():
        if value < low:
            option = "-n" if name == "n" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be at least {low}, not {value}")


def backends(ops: Iterable[str], device: torch.device, dtype: torch.dtype) -> str:
    """Which backend each op will take, asked with a call of the size of one sample; one name if it is one for all."""
    taken = {}
    for name in ops:
        call = next(s for s in OPS[name].make_samples(device.type, dtype))
        taken[name] = OPS[name].choose(call.args()).name
    if len(set(taken.values())) == 1:
        return next(iter(taken.values()))
    return ", ".join(f"{op} {backend}" for op, backend in taken.items())


def machine(diffusion: Diffusion, ops: Iterable[str], device: torch.device) -> str:
    """The line that says on what a model runs: the device, the dtype and the backends. The first question also builds
    the native library if need be, so that its time is not counted as the model's."""
    dtype = next(diffusion.model.parameters()).dtype
    return (
        f"{doctor.device_name(device)}, {str(dtype).removeprefix('torch.')}, backends: {backends(ops, device, dtype)}"
    )

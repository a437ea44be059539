"""What ops are timed on: the workloads of a model by its name, or calls of a user's own from a file."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern import files
from diffkern.columns import aligned
from diffkern.op import OPS, Op, Sample
from diffkern.testing import make

MODELS = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "dit": "DiT",
    "cifar": "CIFAR",
    "emoji": "emoji",
    "flux": "FLUX.1",
    "sd35": "SD 3.5",
    "pixart": "PixArt",
    "audio": "Stable Audio Open",
    "imagenet": "ImageNet",
}
"""The models that workloads come from: how the name of each one's samples begins."""

LAYOUTS = ("contiguous", "channels_last", "strided")
OF_ITS_OWN = ("keys", "table", "t", "timestep", "cos", "sin")  # arguments that are not just normal numbers


def model_of(sample: Sample) -> str | None:
    """The model that a workload comes from; None for what is none."""
    if not sample.workload:
        return None
    return next(name for name, begins in MODELS.items() if sample.name.startswith(begins))


def ops_of(shapes: str | None, device: str) -> list[str]:
    """The ops that have something to time on a device: of those of a file, or of all, those with a kernel for it."""
    names = OPS if shapes is None or shapes in MODELS else load(Path(shapes))
    return sorted(name for name in names if has_kernel(OPS[name], device))


def has_kernel(op: Op, device: str) -> bool:
    """Whether one of an op's backends is for a device."""
    return any(device in b.devices or (device == "cpu" and b.is_interpreted()) for b in op.backends)


def workloads(op: Op, shapes: str | None, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """What of an op is timed on a device. shapes: a model's name, a file, or None for all that models have. Raises
    ValueError for a file that cannot be read, and for a call in it that its op does not take."""
    if shapes is None or shapes in MODELS:
        for sample in op.make_samples(device, dtype):
            if sample.workload in (True, device) and shapes in (None, model_of(sample)):
                yield sample
        return
    for call in load(Path(shapes)).get(op.name, ()):
        yield Sample(in_words(call), partial(arguments, op, call, device, dtype), True)


def load(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The calls in a file, by op: {"rms_norm": [{"x": [8, 256, 1152], "weight": [1152]}]}. Of an argument that is a
    tensor the shape is given, of others the value; "layout" says how the first tensor lies in memory. What is not given
    has its default."""
    if not file.exists():
        raise ValueError(f"--shapes is none of {', '.join(MODELS)}, and there is no file {file}")
    found = files.read_json(file)
    entries = found.items() if isinstance(found, dict) else ()
    if not entries or not all(isinstance(calls, list) and calls for _, calls in entries):
        raise ValueError(f'{file} does not say ops and their calls, as {{"rms_norm": [{{"x": [8, 256, 1152]}}]}} does')
    for name, calls in entries:
        if name not in OPS:
            raise ValueError(f"{file}: no op is named {name!r}: choose one of {', '.join(sorted(OPS))}")
        for call in calls:
            _check(file, OPS[name], call)
    return dict(entries)


def _check(file: Path, op: Op, call: Any) -> None:
    """Raise ValueError if an op does not take a call, as its reference says of tensors without memory."""
    where = f"{file}: {op.name}, {json.dumps(call)}"
    if not isinstance(call, dict):
        raise ValueError(f"{where}: give the arguments by name, of {', '.join(op.positions)}")
    for name, parameter in op.signature.parameters.items():
        if name in OF_ITS_OWN and (name in call or parameter.default is inspect.Parameter.empty):
            raise ValueError(
                f"{where}: {name} is made by the op's own workloads only: choose one of {', '.join(MODELS)}"
            )
    for name in call:
        if name != "layout" and name not in op.positions:
            raise ValueError(f"{where}: there is no argument {name}: it takes {', '.join(op.positions)}")
    if (layout := call.get("layout", LAYOUTS[0])) not in LAYOUTS:
        raise ValueError(f"{where}: no layout is named {layout!r}: choose one of {', '.join(LAYOUTS)}")
    try:
        op.reference(*arguments(op, call, "meta", torch.float32))
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        raise ValueError(f"{where}: {str(e).strip().splitlines()[0]}") from None


def arguments(op: Op, call: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of a call in a file: normal numbers in its shapes. Tensors of as many axes as the first one have
    its layout."""
    given: dict[str, Any] = {}
    axes = 0
    for name, value in call.items():
        if name == "layout":
            continue
        if isinstance(value, list) and _takes_tensor(op, name):
            axes = axes or len(value)
            layout = call.get("layout", LAYOUTS[0]) if len(value) == axes else LAYOUTS[0]
            value = make(tuple(value), device, dtype, layout, seed=len(given))
        given[name] = value
    return op.bind(**given)


def _takes_tensor(op: Op, name: str) -> bool:
    hint = typing.get_type_hints(op.reference)[name]
    return Tensor in (hint, *typing.get_args(hint))


def in_words(call: dict[str, Any]) -> str:
    """The name of a call in a file: "x 8x256x1152, weight 1152"."""
    said = {name: "x".join(map(str, value)) if isinstance(value, list) else value for name, value in call.items()}
    return ", ".join(f"{name} {value}" for name, value in said.items())


def listed(device: str) -> str:
    """The ops with their workloads and the models that these come from, a line each."""
    lines = [("op", "workload", "model", "")]
    for name in sorted(OPS):
        for sample in OPS[name].make_samples(device, torch.float32):
            if (model := model_of(sample)) is not None:
                lines.append((name, sample.name, model, "" if sample.workload is True else f"{sample.workload} only"))
    return aligned(lines)

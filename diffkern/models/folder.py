"""Reads and writes the diffusers model folder: config.json beside diffusion_pytorch_model.safetensors. Safetensors
only, never pickles; whatever is wrong with a folder gets one sentence that names it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The attention of weights saved before diffusers 0.13 has other names.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


_LARGEST_JSON = 1 << 24  # bytes; an index of weights, which is larger than any config, has some hundred thousand


class ModelError(ValueError):
    """A model folder that cannot be used. The message is one sentence that says what is wrong and where; of what the
    folder's files say, which may be any text, as much as a sentence has room for."""

    def __str__(self) -> str:
        text = super().__str__().replace("\n", " ")
        return text if len(text) <= 500 else f"{text[:500]} ..."


def check_choice(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(str(a).lower() if a is None else str(a) for a in allowed)
        raise ModelError(f"config.json has {key} {value!r}: allowed here is {choices}")


def check_type(key: str, value: Any, annotation: str, low: int = 0) -> None:
    """Check a config value against the annotation of its field. Numbers are bounded, `low` to 65536, so that a config
    can ask for no network that takes forever to build."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    for kind in kinds:
        if kind == "None" and value is None:
            return
        if kind.startswith("tuple") and isinstance(value, tuple) and len(value) <= 64:
            for item in value:
                check_type(key, item, kind[len("tuple[") :].split(",")[0], low)
            return
        if kind in ("int", "float") and isinstance(value, int if kind == "int" else (int, float)):
            if not isinstance(value, bool) and low <= value <= 1 << 16:
                return
        elif kind in ("bool", "str") and isinstance(value, bool if kind == "bool" else str):
            return
    raise ModelError(f"config.json has {key} {value!r}: this must be {' or '.join(kinds)}, numbers from {low} to 65536")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError if it is missing, no JSON object or far too large for a config."""
    if path.exists() and not path.is_file():
        raise ModelError(f"cannot read {path}: it is not a file")
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ModelError(f"{path} has {size} bytes, which is no config: allowed are {_LARGEST_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def values_of(dataclass: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of the fields of a dataclass, lists as tuples. Its other keys are left out."""
    known = {f.name for f in fields(dataclass)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}


def read_config(path: str | Path, *class_names: str) -> dict[str, Any]:
    """config.json of a folder, which must be of a diffusers class of one of these names."""
    if not Path(path).is_dir():
        raise ModelError(f"{path} is not a folder with a model (config.json and {WEIGHTS})")
    config = read_json(Path(path) / "config.json")
    if (found := config.get("_class_name", class_names[0])) not in class_names:
        raise ModelError(f"{path} holds a {found}, not a {class_names[0]}")
    return config


def read_weights(model: nn.Module, path: str | Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Fill a model made on the meta device. On a CPU a weight that has the dtype already is not copied: it is a part of
    the file that safetensors maps. Raises ModelError naming a key that is missing, left over, or of another shape or a
    dtype that is no floating point."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{path} has no {WEIGHTS} (pickled weights are never read)")
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as weights:
            for stored in weights.keys():  # noqa: SIM118 (safe_open has no __iter__)
                key = ".".join(_OLD_NAMES.get(part, part) for part in stored.split("."))
                if key not in wanted:
                    raise ModelError(f"{file} has the weight {stored!r}, which the model of config.json does not have")
                shape = tuple(weights.get_slice(stored).get_shape())
                if shape != tuple(wanted[key].shape):
                    expected = tuple(wanted[key].shape)
                    raise ModelError(f"{file}: weight {stored!r} has shape {shape}, the config asks for {expected}")
                tensor = weights.get_tensor(stored)
                if not tensor.is_floating_point():
                    raise ModelError(f"{file}: weight {stored!r} has dtype {tensor.dtype}, which is no floating point")
                state[key] = tensor.to(device, dtype)
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{file} is corrupt or truncated: {e}") from None
    if missing := sorted(wanted.keys() - state.keys()):
        raise ModelError(f"{file} lacks {len(missing)} weights that the config asks for, {missing[0]!r} first")
    model.load_state_dict(state, assign=True)


def lay_out(model: Model, device: torch.device | str) -> Model:
    """Lay out the weights as kernels read them: those of convolutions channels_last. Not on a CPU, where kernels pack
    them from either layout: a copy would take their memory once more."""
    if torch.device(device).type != "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def write(path: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write config.json and the weights, each whole or not at all."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    with tempfile.TemporaryDirectory(dir=path, prefix=".writing-") as scratch:
        save_file(tensors, os.path.join(scratch, WEIGHTS), metadata={"format": "pt"})
        Path(scratch, "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, "config.json"):
            os.replace(os.path.join(scratch, name), path / name)

"""What tells one model, or one run's settings, from another: for whatever goes on with work that was begun before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

DIGESTS = ("model", "decode", "table")  # settings that are hashes, which say nothing to a reader


def hash_tensors(named: Iterable[tuple[str, Tensor]], found: Any = None) -> Any:
    """A SHA-256 object of tensors with their names, dtypes and shapes: of their numbers' bytes in logical order, on
    whatever device and in whatever memory format they are. found: one that goes on."""
    found = hashlib.sha256() if found is None else found
    for name, tensor in named:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found


def digest(model: Any) -> str:
    """A SHA-256 of what a model or another function computes with. Of a module, or a method of one: its class, its
    config, its weights and what is bound to it, however they were loaded. Of another function, its name: two that are
    named alike are taken for one."""
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    method = "" if module is model else getattr(model, "__qualname__", type(model).__qualname__)
    if not isinstance(module, nn.Module):
        return hashlib.sha256(f"{getattr(model, '__module__', '')} {method}".encode()).hexdigest()
    said = f"{type(module).__name__} {method} {[_config(m) for m in module.modules() if hasattr(m, 'config')]}"
    bound = tree_leaves(getattr(module, "bound", tuple)())
    tensors = [*sorted(module.state_dict().items()), *((f"bound {i}", t) for i, t in enumerate(bound))]
    return hash_tensors(
        ((name, t) for name, t in tensors if isinstance(t, Tensor)), hashlib.sha256(said.encode())
    ).hexdigest()


def _config(module: nn.Module) -> str:
    """Without what a library notes of itself, such as where it read a config."""
    config: Any = module.config
    return repr({k: v for k, v in config.items() if k[:1] != "_"} if isinstance(config, Mapping) else config)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two sets of settings differ, in words."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [
        f"another {key}"
        if key in DIGESTS
        else f"other {key}"
        if len(f"{before.get(key)}{now.get(key)}") > 80
        else f"{key} {before.get(key)}, not {now.get(key)}"
        for key in keys
    ]

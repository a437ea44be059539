"""Other libraries' models and schedulers on diffkern's ops. Each is imported only when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name not in ("accelerate", "diffusers"):
        raise AttributeError(f"module 'diffkern.integrations' has no attribute {name!r}")
    return importlib.import_module(f"diffkern.integrations.{name}")

"""What the tests of the native libraries share: a machine where nothing was built, and a script for a compiler, so that
a build takes no time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import diffkern.native

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake compiler 1.0"; exit 0; fi
for arg in "$@"; do [ "$before" = -o ] && out=$arg; before=$arg; done
case " $* " in
  *" -shared "*) echo link >> {calls}; {link} ;;
  *) {compile} ;;
esac
"""


class Compiler:
    """A script that is called like a C++ compiler, and writes down how often it links."""

    def __init__(self, folder: Path, link: str = 'echo library > "$out"', compile: str = ': > "$out"') -> None:
        self.calls, self.path = folder / "calls", folder / "fake-g++"
        self.path.write_text(FAKE.format(calls=self.calls, link=link, compile=compile))
        self.path.chmod(0o755)

    @property
    def builds(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine where nothing was ever built. Returns its cache folder."""
    for name in ("DIFFKERN_NO_BUILD", "DIFFKERN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home" / ".cache" / "diffkern"


@pytest.fixture
def loaded(monkeypatch):
    """The libraries that torch was asked to load, instead of loading them."""
    paths: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: paths.append(Path(path)))
    return paths


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    made = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(made.path))
    return made


def fresh() -> Any:
    """The loader as a new process has it."""
    spec: Any = importlib.util.spec_from_file_location("native", diffkern.native.__file__)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._PACKAGE = Path(diffkern.native.__file__).with_name("nowhere")  # no library built ahead of time
    return module

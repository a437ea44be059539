"""Builds the native library ahead of time where torch and a compiler are there (`pip install --no-build-isolation .`).

Everywhere else, and whenever that fails, the library is built on first use: an install never fails because of it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def load_toolchain() -> ModuleType:
    """diffkern/toolchain.py by its path: importing the package would need all that it depends on."""
    spec = importlib.util.spec_from_file_location("toolchain", Path(__file__).parent / "diffkern" / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()


def why_not_now() -> str | None:
    """The reason why nothing can be built ahead of time here, or None."""
    if os.environ.get("DIFFKERN_NO_BUILD", "0") not in ("", "0"):
        return "DIFFKERN_NO_BUILD is set"
    if os.name != "posix" or platform.machine() != "x86_64":
        return "only x86-64 has fixed levels of instructions"
    if importlib.util.find_spec("torch") is None:
        return "there is no torch in the build's environment"
    try:
        toolchain.find_compiler()
    except toolchain.BuildError as error:
        return str(error)
    return None


REASON = why_not_now()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the sources will change: built on first use
        reason = REASON
        try:
            for level in toolchain.AHEAD_OF_TIME_LEVELS if reason is None else ():
                library = toolchain.ahead_of_time_path(Path(self.build_lib, "diffkern"), level)
                library.parent.mkdir(parents=True, exist_ok=True)
                log = Path(self.build_lib).parent / f"diffkern_cpu-{level}.log"
                toolchain.build(library, toolchain.cpu_recipe(level), log)
                print(f"diffkern: built {library}")
        except Exception as error:
            reason = str(error)
        if reason is not None:
            print(f"diffkern: the cpu library will be built on first use: {reason}")


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return REASON is None


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # The library knows torch's stable ABI and nothing of Python's.
        python, abi, plat = super().get_tag()
        return ("py3", "none", plat) if REASON is None else (python, abi, plat)


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=BinaryDistribution)

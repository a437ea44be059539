"""What users have in place of diffkern: one small file a rival, found by its name. To add one, write a file that makes
a `RIVAL`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffkern.op import Op
from diffkern.schedules import one_of
from diffkern.testing import oracle, tensors

Args = tuple[Any, ...]
Run = Callable[[], Any]
Bind = Callable[..., Run]
"""Called once with an op's arguments, gives the call to time."""

FIRST = ("eager", "compile")  # they are PyTorch, and what one would write: true by definition
LOOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""What a rival's error may be, as a share of the oracle's root mean square, by the narrowest dtype among its tensors:
some approximate GELU or a normal's integral, some add in 16 bits. Arguments in the wrong order, or a wrong layout, give
about 1."""


@dataclass(frozen=True)
class Rival:
    """why_not(device): None, or in one sentence why it cannot be timed there: what is missing, and how to get it.
    ops(op, args, device): what it has in place of an op for such a call, by the name under which it is recorded;
    nothing where it has none. networks: its forms of a whole network, by the name under which it is recorded: each
    makes a run of (network, folder of its weights, dtype)."""

    why_not: Callable[[str], str | None] = lambda device: None
    ops: Callable[[Op, Args, str], Mapping[str, Bind]] = lambda op, args, device: {}
    networks: Mapping[str, Callable[..., Run]] = field(default_factory=dict)


def installed(package: str, device: str = "", how: str = "") -> Callable[[str], str | None]:
    """The `why_not` of a rival that needs a package. device: it runs only there. how: to get the package, where pip
    does not."""

    def why_not(here: str) -> str | None:
        if device not in ("", here):
            return f"runs on {device} only"
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed ({how or f'pip install {package}'})"
        return None

    return why_not


@functools.cache
def rivals() -> dict[str, Rival]:
    """All of them, by the names of their files: eager and compile first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return {name: importlib.import_module(f"{__name__}.{name}").RIVAL for name in names}


def named(given: str) -> tuple[str, ...]:
    """The rivals of a list with commas, or none. Raises ValueError, naming the choices, for another name."""
    names = () if given == "none" else tuple(given.split(","))
    for name in names:
        one_of("rival", name, (*rivals(), "none"))
    return names


def left_out(names: Iterable[str], device: str) -> dict[str, str]:
    """Of these rivals, those that cannot be timed on a device, and why."""
    reasons = {name: rivals()[name].why_not(device) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def later(function: Callable[..., Any]) -> Bind:
    return lambda *args: lambda: function(*args)


def calls(op: Op, args: Args, device: str, names: Iterable[str]) -> dict[str, Bind]:
    """What these rivals have in place of an op for such a call, by the name under which it is recorded."""
    found: dict[str, Bind] = {}
    for name in names:
        rival = rivals()[name]
        if rival.why_not(device) is None:
            binds = rival.ops(op, args, device)
            found |= binds if name in FIRST else {form: judged(op, bind) for form, bind in binds.items()}
    return found


def judged(op: Op, bind: Bind) -> Bind:
    """The same, but it raises RuntimeError, with one line, if it cannot run or computes something else than the op."""
    right = False

    def bound(*args: Any) -> Run:
        nonlocal right
        try:
            call = bind(*args)
            if not right:
                judge(op, args, call())
                right = True
        except Exception as error:  # of any library
            lines = str(error).strip().splitlines()
            raise RuntimeError(lines[0] if lines else type(error).__name__) from error
        return call

    return bound


def judge(op: Op, args: Args, result: Any) -> None:
    """Raise ValueError if a rival's result is not that of the op, within what its dtype deserves."""
    expected, got = oracle(op, args), tensors(result)
    allowed = max(LOOSE.get(a.dtype, 0) for a in args if isinstance(a, Tensor))
    if len(got) != len(expected):
        raise ValueError(f"it gives {len(got)} results where {op.name} gives {len(expected)}")
    for e, g in zip(expected, got, strict=True):
        if e.shape != g.shape:
            raise ValueError(f"its result is {list(g.shape)}, that of {op.name} is {list(e.shape)}")
        error = (g.double() - e).square().mean().sqrt() / e.square().mean().sqrt()
        if e.numel() and not error <= allowed:
            raise ValueError(f"its result is wrong by {error:.2g} of what it should be")

"""Launches the kernels of every op as kernels/launch.py does and as Triton does, and compares what is started.

    python tests/compare_launches.py [OP...]    prints JSON: for each op its launches, forms, and Python functions

It runs in a process of its own: Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffkern.kernels import configs
from diffkern.kernels.launch import Remembered
from torch import Tensor

from diffkern.op import OPS, Op

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from bench_launch import Launcher, functions, sample_of, stand_in, triton_of

PRODUCTS = ("linear", "conv2d")
started: list[tuple[str, Any]] = []  # the kernel, and the form of it that was launched
remembered = Remembered.launch


def both(self: Remembered, grid: tuple[int, ...], *args: Any, **more: Any) -> None:
    """Launch in both ways. The arguments are the same objects, and the compiled form is one of those that there are."""
    self.kernel[grid](*args, **more)
    form, *plain = Launcher.last
    before, Launcher.last = len(self.found), ()
    remembered(self, grid, *args, **more)
    again, *ours = Launcher.last
    assert again is form, f"{self.kernel.__name__}: another form for {args}"
    # Behind the grid: stream, function, what the form itself brings, hooks; then the arguments.
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert a is b or (type(a) is type(b) and (type(a).__name__ == "LazyDict" or a == b)), f"{a!r}, not {b!r}"
    started.append((self.kernel.__name__, id(form) if len(self.found) == before else None))


def shifted(t: Any, by: int) -> Any:
    """A tensor's copy that begins `by` numbers behind the beginning of a piece of memory: where wide loads cannot."""
    if not isinstance(t, Tensor) or not t.numel():
        return t
    numbers = t.untyped_storage().nbytes() // t.element_size()
    memory = torch.cat([t.new_zeros(by), t.as_strided((numbers,), (1,), 0)])
    return memory.as_strided(t.shape, t.stride(), by + t.storage_offset())


def calls(op: Op) -> Iterator[tuple[Any, ...]]:
    """The op's small samples, in two dtypes, one of them also out of alignment."""
    for dtype in (torch.bfloat16,) if op.name in PRODUCTS else (torch.bfloat16, torch.float32):
        for sample in (s for s in op.make_samples("cpu", dtype) if not s.workload):
            args = op.bind(*sample.args())
            if sum(t.numel() for t in args if isinstance(t, Tensor)) < 1 << 13:
                yield args
                if dtype == torch.bfloat16:
                    yield tuple(shifted(a, 1) for a in args)


def trials(name: str) -> list[configs.Shape | None]:
    """Launch shapes that only a table of a GPU chooses: kernels that get tensors by descriptor."""
    if name not in PRODUCTS:
        return [None]
    return [None, *(cut._asdict() for cut in importlib.import_module(f"diffkern.kernels.{name}").CUTS[2:3])]


def compare(name: str, op: Op) -> dict[str, Any]:
    run = triton_of(op)
    everything = list(calls(op))[: 20 if name in PRODUCTS else None]  # PyTorch's products take their time
    for trial in trials(name):
        with configs.trying(lambda kernel, key, trial=trial: trial if kernel == name else None):  # type: ignore[misc]
            for args in (*everything, *reversed(everything)):
                run(*args)  # type: ignore[misc]
    launches, forms = len(started), {form for _, form in started}
    found = sum(form is not None for _, form in started)
    started.clear()
    return {"launches": launches, "found": found, "forms": len(forms)}


def new_for_draws() -> list[int]:
    """How many calls of its noise kernel are remembered after each of these draws, which change in every step."""
    from diffkern.kernels import randn

    counts = []
    for draw in (5, 17, 1 << 31, 16, 0xFFFFFFFF):  # from 2^31 on it takes 64 bits
        randn.randn(torch.zeros(2, 2, dtype=torch.int64), [3], draw, torch.float32, 0)
        counts.append(len(randn._randn.found))
    return [n - counts[0] for n in counts]


if __name__ == "__main__":
    stand_in()
    answer = {}
    for name, op in sorted(OPS.items()):
        if triton_of(op) and name in (sys.argv[1:] or OPS):
            Remembered.launch = both  # type: ignore[method-assign]
            answer[name] = compare(name, op)
            if name == "randn":
                answer[name]["draws"] = new_for_draws()
            Remembered.launch = remembered  # type: ignore[method-assign]
            answer[name]["functions"] = functions(sample_of(op))
    print(json.dumps(answer))

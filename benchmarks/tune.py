"""Find the fastest launch shapes of kernels on this GPU, and write the table that they are looked up in.

    python benchmarks/tune.py --op attention                     # kernels/configs/sm_<architecture>.json
    python benchmarks/tune.py --op attention --seconds 60 --out sm_90.json

What is decided may be how an op serves the next: `CHAINS` says what is timed then.

A kernel that is tuned says in `tuning(*args, arch)` what its table tells calls apart by, and which shapes are worth a
try, those of a twin in CUDA among them. Many processes compile them all; then one, alone on the device, checks each
against the oracle and times it and PyTorch's own in turn, on the op's workloads. A kernel that reads where it must not
ends its process and nothing else.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffkern.kernels
import torch
import torch.nn.functional as F
from diffkern.kernels import configs
from diffkern.kernels.conv2d_moments import pays
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkern.backend import use_backend
from diffkern.bench import children, gpu, record
from diffkern.bench.plain import PLAIN
from diffkern.op import OPS, Sample
from diffkern.ops import conv2d, conv2d_moments, group_norm_silu
from diffkern.ops.conv2d import compose
from diffkern.testing import check

DTYPE = torch.bfloat16
EACH = 40.0  # seconds that a child may take for an item
ROUNDS = 5
SLOWER = 1.5  # times the fastest: what is slower in the first round is not timed again

GROUPS = 32

Item = tuple[str, str, list[configs.Shape]]  # op, sample, shapes


def samples(name: str, device: str) -> dict[str, Sample]:
    """The workloads; first those that are only for a GPU, which stand for theirs where two are alike to the table."""
    found = [s for s in OPS[name].make_samples(device, DTYPE) if s.workload]
    return {s.name: s for s in sorted(found, key=lambda s: s.workload != "cuda")}


def plan(name: str, arch: int) -> dict[str, tuple[str, list[configs.Shape]]]:
    """For every entry of an op's table of which there is a choice: the sample that it is timed on, and the shapes."""
    tuning = importlib.import_module(f"diffkern.kernels.{name}").tuning
    found: dict[str, tuple[str, list[configs.Shape]]] = {}
    for sample in samples(name, "cpu").values():
        with FakeTensorMode():
            key, shapes = tuning(*OPS[name].bind(*sample.args()), arch)
        if len(shapes) > 1:
            found.setdefault(key, (sample.name, shapes))
    return found


def convolution_and_norm(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *rest: Any) -> Tensor:
    """As in the networks: with moments where they pay, or are tried."""
    if pays(x, len(weight), stride, rest[-1]):
        y, moments = conv2d_moments(x, weight, bias, stride, *rest)
        return group_norm_silu(y, GROUPS, moments=moments)
    return group_norm_silu(conv2d(x, weight, bias, stride, *rest), GROUPS)


def plain_convolution_and_norm(*args: Any) -> Tensor:
    return F.silu(F.group_norm(compose(*args), GROUPS))


# What is timed in place of an op alone, by the backends that are chosen, and PyTorch's own.
CHAINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv2d_moments": (convolution_and_norm, plain_convolution_and_norm),
}


def run_in(name: str, shape: configs.Shape, call: Callable[[], Any]) -> Any:
    """The call, with one op's kernel in this shape; others that it calls have theirs."""
    backend = "auto" if name in CHAINS else backend_of(shape)
    with configs.trying(lambda kernel, key: shape if kernel == name else None), use_backend(backend):
        return call()


def backend_of(shape: configs.Shape) -> str:
    return "cuda" if configs.CUDA in shape else "triton"


def timed_of(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What is timed of an op, and PyTorch's own: a backend, or what one would write."""
    if name in CHAINS:
        return CHAINS[name]
    own = next((b for b in OPS[name].backends if b.name == "torch"), None)
    return OPS[name].overload, own or PLAIN[name]


class Child:
    """Compiles, or checks and times, items one after another."""

    def __init__(self, compiles: bool) -> None:
        self.compiles = compiles

    def answer(self, item: Item) -> dict[str, Any]:
        """Microseconds by shape, as text, and of "torch"; or why not."""
        name, sample, shapes = item
        args = OPS[name].bind(*samples(name, "cuda")[sample].args())
        if self.compiles:
            return {str(shape): self.compile(name, args, shape) for shape in shapes}
        found: dict[str, Any] = {}
        right = {}
        for shape in shapes:
            try:
                run_in(name, shape, functools.partial(check, OPS[name], backend_of(shape), args))
                right[str(shape)] = shape
            except (AssertionError, RuntimeError) as error:
                if "CUDA error" in str(error):
                    raise
                found[str(shape)] = str(error).splitlines()[0]
        return found | self.time(name, args, right)

    def compile(self, name: str, args: tuple[Any, ...], shape: configs.Shape) -> str | None:
        from triton.runtime.jit import JITFunction

        plain, made = JITFunction.run, []

        def warm(self: Any, *given: Any, grid: Any, warmup: bool, **more: Any) -> None:
            made.append(plain(self, *given, grid=grid, warmup=True, **more))
            made[-1]._init_handles()

        JITFunction.run = warm
        try:
            run_in(name, shape, lambda: OPS[name].overload(*args))
        except Exception as error:  # of the compiler, or too much of a resource
            return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        finally:
            JITFunction.run = plain
        spills = max((kernel.n_spills for kernel in made), default=0)
        return f"{spills} spills" if spills else None

    def time(self, name: str, args: tuple[Any, ...], shapes: dict[str, configs.Shape]) -> dict[str, Any]:
        ours, torch_own = timed_of(name)

        def bind(shape: configs.Shape) -> gpu.Bind:
            return lambda *a: lambda: run_in(name, shape, lambda: ours(*a))

        binds: dict[str, gpu.Bind] = {text: bind(shape) for text, shape in shapes.items()}
        binds["torch"] = lambda *a: lambda: torch_own(*a)
        sets = gpu.sets_of(args, OPS[name].count_cost(*args).bytes)
        first, _, refused = gpu.interleave(binds, sets, 1)
        fastest = min(t[0] for t in first.values())
        again = {n: binds[n] for n, t in first.items() if t[0] < SLOWER * fastest or n == "torch"}
        seconds, _, _ = gpu.interleave(again, sets, ROUNDS)
        return {n: record.spread(t)["median"] * 1e6 for n, t in (first | seconds).items()} | refused


def compiled(work: list[Item], options: argparse.Namespace, until: float) -> list[Item]:
    """The items, with those of their shapes that compile and keep their numbers in registers."""
    single = [(name, sample, [shape]) for name, sample, shapes in work for shape in shapes]
    bad: dict[tuple[str, str, str], str] = {}
    command = [__file__, "--child", "compile"]
    for (name, sample, shapes), answer in children.answers(command, single, options.processes, until, EACH):
        reason = answer if isinstance(answer, children.Failure) else answer[str(shapes[0])]
        if reason is not None:
            bad[name, sample, str(shapes[0])] = reason
    for (_, sample, shape), reason in bad.items():
        print(f"left out: {sample}: {shape}: {reason}")
    return [(n, s, [shape for shape in shapes if (n, s, str(shape)) not in bad]) for n, s, shapes in work]


def timed(work: list[Item], until: float) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers by op and sample. Where one shape takes the process with it, each gets a process of its own."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    command = [__file__, "--child", "time"]
    for (name, sample, shapes), answer in children.answers(command, work, 1, until, EACH):
        if not isinstance(answer, children.Failure):
            found[name, sample] = answer
            continue
        print(f"{sample}: one shape at a time, because {answer}")
        for item, alone in children.answers(command, [(name, sample, [s]) for s in shapes], 1, until, EACH):
            text = str(item[2][0])
            found.setdefault((name, sample), {}).update({text: alone} if isinstance(alone, children.Failure) else alone)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="an op whose kernel has shapes to tune (may be repeated)")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing after so many")
    parser.add_argument("--processes", type=int, default=16, help="that compile")
    parser.add_argument("--out", type=Path, help="the table to write; default: the one that is looked up")
    parser.add_argument("--child", choices=("compile", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpu.settings()
    if options.child:
        child = Child(options.child == "compile")
        children.serve(lambda item: child.answer(item))
        return

    start = time.monotonic()
    until = start + options.seconds
    arch = configs.architecture(torch.device("cuda", torch.cuda.current_device()))
    plans = {name: plan(name, arch) for name in options.op or ("attention",)}
    work = [(name, sample, shapes) for name, entries in plans.items() for sample, shapes in entries.values()]
    work = compiled(work, options, until)
    print(f"compiled {sum(len(shapes) for *_, shapes in work)} in {time.monotonic() - start:.0f} s")
    found = timed(work, until)

    out = options.out or Path(diffkern.kernels.__path__[0], "configs", f"sm_{arch}.json")
    table = json.loads(out.read_text("utf-8")) if out.exists() else {"kernels": {}}
    for name, entries in plans.items():
        for key, (sample, shapes) in entries.items():
            line, entry = best(found.get((name, sample), {}), shapes)
            print(f"{sample:36} {line}")
            if entry is not None:
                table["kernels"].setdefault(name, {})[key] = entry
    table["gpu"] = torch.cuda.get_device_name()
    table["versions"] = record.machine()["versions"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{out}, after {time.monotonic() - start:.0f} s")


def best(answer: dict[str, Any], shapes: list[configs.Shape]) -> tuple[str, dict[str, Any] | None]:
    """A line to print, and the entry for a table: the fastest shape of each of the two kernels, if one of Triton's was
    timed."""
    times = sorted((us, text) for text, us in answer.items() if isinstance(us, float) and text != "torch")
    if not times or "torch" not in answer:
        return f"nothing was timed: {next(iter(answer.values()), 'no time was left')}", None
    by_text = {str(shape): shape for shape in shapes}
    own = answer["torch"]
    names = {text: "-".join(map(str, shape.values())) or "no shape" for text, shape in by_text.items()}
    names |= {text: f"CUDA-{names[text]}" for text, shape in by_text.items() if backend_of(shape) == "cuda"}
    ranking = "   ".join(f"{us:.2f} {names[text]}" for us, text in times[:4])
    wrong = [f"{text}: {why}" for text, why in answer.items() if isinstance(why, str)]
    line = f"torch {own:8.2f} us   {own / times[0][0]:.2f}x   {ranking}" + "".join(f"\n    {w}" for w in wrong)
    fastest: dict[str, tuple[float, configs.Shape]] = {}
    for us, text in times:
        fastest.setdefault(backend_of(by_text[text]), (float(f"{us:.4g}"), by_text[text]))
    if "triton" not in fastest:
        return line, None
    us, shape = fastest["triton"]
    entry: dict[str, Any] = {"shape": shape, "us": us, "torch_us": float(f"{own:.4g}")}
    if "cuda" in fastest:
        us, shape = fastest["cuda"]
        entry |= {"cuda_us": us, "cuda_block": shape[configs.CUDA]}
    return line, entry


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with torch.no_grad():
        main()

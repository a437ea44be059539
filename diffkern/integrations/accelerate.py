"""A diffusers pipeline, or a model, made faster in place: `diffkern.accelerate(pipe)`.

Computations are replaced, never weights: a module becomes a subclass of its own class (see `modules.base`), the
scheduler a fused one. `restore` gives them their own classes back.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections import Counter
from importlib.metadata import version
from typing import Any

from torch import nn

from diffkern.available import availability
from diffkern.backend import BackendError, use_backend
from diffkern.graphs import kept
from diffkern.graphs.calls import BEFORE, why_not
from diffkern.graphs.looks import State, has_own_forward
from diffkern.integrations.diffusers import FUSED, fused_class
from diffkern.integrations.modules import PARTS
from diffkern.integrations.modules.base import Accelerated, accelerated_class, become
from diffkern.integrations.modules.networks import AlwaysNetwork, Network
from diffkern.integrations.report import Report
from diffkern.integrations.schedulers.fused import FusedScheduler
from diffkern.samplers.step import placement

# The versions of diffusers that this was tested with, the first and the last.
TESTED = ((0, 35), (0, 42))
# Modules with parameters for which PyTorch's own kernels are as fast.
AS_FAST = ("LayerNorm", "FP32LayerNorm", "Embedding")


def accelerate(
    pipe_or_module: Any, *, backend: str = "auto", schedulers: bool = True, cuda_graph: bool | str = "auto",
    strict: bool = False,
) -> Report:  # fmt: skip
    """Run a diffusers pipeline or model in diffkern's ops, in place, with the same results up to rounding.

    pipe_or_module: a diffusers pipeline, whose diffusers models are accelerated, or any module. backend: of the models'
    ops; "auto" takes the fastest for each call. schedulers: whether the scheduler of a pipeline steps in one op.
    cuda_graph: "auto" records a call of a denoiser, a ControlNet, or the encoder or decoder of a VAE once three
    like it were made, on a GPU in a CUDA graph, on a CPU as the calls of its kernels, and replays it from then on:
    the same bits, without Python and gaps between kernels. Calls are alike if their tensors have the same shapes,
    dtypes and strides and all other arguments are the same; a timestep may be a number. True does so after two,
    also with classes of the user, which then must do the same in each call but for what their attributes and their
    tensors say; what cannot be recorded is then warned of once, on a GPU with "auto" too. False does not, and frees
    the graphs, which on a GPU keep the memory that a call needs. A network that was changed is recorded anew; calls
    with hooks or offloading inside the network, under autocast or torch.compile run as before.
    strict: raise, before anything is changed, if a part of a diffusers model or the scheduler would be left as it is.

    Weights, hooks and config stay the same objects. What is changed later (weights in place, LoRA layers, attention
    processors) shows in the next call. Calls that need gradients run as before. Returns a Report of what was replaced
    and what was not; a second call replaces the first. Raises TypeError for another object, ValueError for a backend
    of another name, another cuda_graph or, if strict, for what would be left, BackendError for a backend that cannot
    run here."""
    kept.check_option(cuda_graph)
    with use_backend(backend):  # raises for another name
        pass
    if backend != "auto" and (reason := availability(backend)) is not None:
        raise BackendError(f"backend {backend!r} was asked for but {reason}")
    parts, scheduler, others = _taken_apart(pipe_or_module)
    _check_version()
    plan: list[tuple[nn.Module, Any]] = []
    replaced: Counter[tuple[str, tuple[str, ...]]] = Counter()
    left: Counter[tuple[str, str, bool]] = Counter(others)
    graphs: Counter[tuple[str, str]] = Counter()
    for module in parts:
        name = type(module).__name__
        plain: Any = getattr(type(module), "plain", type(module))
        if plain in _registry((Network,)):
            cls, how = _recorded(module, plain, cuda_graph)
            plan.append((module, cls))
            if how is not None:
                graphs[name, how] += 1
            continue
        part = _registry().get(plain)
        reason = _why_left(module) if part is None else part.why_not(module)
        if part is not None and reason is None and has_own_forward(module):
            reason = "another library has replaced its forward"
        if part is not None and reason is None:
            plan.append((module, accelerated_class(part, plain, backend)))
            replaced[name, part.ops] += 1
        elif reason is not None:
            left[name, reason, name not in AS_FAST and any(True for _ in module.parameters())] += 1
    fused = None
    if schedulers and scheduler is not None:
        name, reason = type(scheduler).__name__, _why_not_fused(scheduler)
        if reason is None:
            own: Any = type(scheduler)
            fused = own if isinstance(scheduler, FusedScheduler) else fused_class(own)
            replaced[name, ("sampler_step",)] += 1
        else:
            left[name, reason, True] += 1
    report = Report.of(replaced, left, graphs)
    if strict and report.missed:
        missed = ", ".join(f"{entry.count} {entry.name} ({entry.reason})" for entry in report.missed)
        raise ValueError(f"strict=True leaves nothing as it is, but diffkern would leave {missed}")
    for module, cls in plan:
        if type(module) is not cls:
            become(module, cls)
    if fused is not None:
        scheduler.__class__ = fused
    return report


def restore(pipe_or_module: Any) -> None:
    """Undo `accelerate`: every module and the scheduler, also one that was fused by itself, get their own classes back.
    Raises TypeError for another object."""
    parts, scheduler, _ = _taken_apart(pipe_or_module)
    for module in parts:
        if isinstance(module, Accelerated):
            become(module, module.plain)
    if isinstance(scheduler, FusedScheduler):
        for name in ("_levels", "counter_seed"):
            vars(scheduler).pop(name, None)
        scheduler.__class__ = type(scheduler).__bases__[-1]


def _taken_apart(pipe_or_module: Any) -> tuple[list[nn.Module], Any, Counter[tuple[str, str, bool]]]:
    """The modules of a pipeline's diffusers models, or of a module, each once; the scheduler, or None; and what else a
    pipeline computes with."""
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError("accelerate needs diffusers: pip install 'diffkern[diffusers]'") from error
    others: Counter[tuple[str, str, bool]] = Counter()
    if isinstance(pipe_or_module, nn.Module):
        return list(pipe_or_module.modules()), None, others
    if not isinstance(pipe_or_module, diffusers.DiffusionPipeline):
        raise TypeError(f"this takes a diffusers pipeline or a module, not {type(pipe_or_module).__name__}")
    modules: dict[nn.Module, None] = {}
    for component in pipe_or_module.components.values():
        for model in component if isinstance(component, (list, tuple)) else (component,):
            if isinstance(model, diffusers.ModelMixin):
                modules.update(dict.fromkeys(model.modules()))
            elif isinstance(model, nn.Module):
                others[type(model).__name__, "it is not a model of diffusers", False] += 1
    return list(modules), getattr(pipe_or_module, "scheduler", None), others


def _recorded(module: Any, plain: Any, cuda_graph: bool | str) -> tuple[Any, str | None]:
    """The class that a network becomes, and what to say of its graphs, if anything."""
    if cuda_graph is False:
        return plain, None
    if has_own_forward(module):
        return type(module), "no graph: another library has replaced its forward"
    cls = accelerated_class(AlwaysNetwork if cuda_graph is True else Network, plain, "auto")
    device = placement(module)[0]
    if not kept.has_graphs(device):
        return cls, f"no graph: it is on the {device.type}, which has none" if cuda_graph is True else None
    reason = why_not(module, cuda_graph is True, State(module))
    if reason is not None:
        return cls, f"no graph: {reason}"
    what = "a CUDA graph of a call" if device.type == "cuda" else "the kernels of a call recorded"
    return cls, f"{what}, after {BEFORE[cuda_graph]} like it"


@functools.cache
def _registry(parts: tuple[type[Accelerated], ...] = PARTS) -> dict[Any, Any]:
    """What stands in for which class. One that the installed diffusers does not have is left out."""
    found: dict[Any, Any] = {}
    for part in parts:
        for path in part.replaces:
            module, name = path.rsplit(".", 1)
            try:
                found[getattr(importlib.import_module(module), name)] = part
            except (ImportError, AttributeError):
                continue
    return found


def _why_left(module: nn.Module) -> str | None:
    """Why a module that nothing stands in for runs as it is, or None for one that only calls others."""
    if type(module).__name__ in AS_FAST:
        return "PyTorch's own kernel is as fast, or its block takes it into an op"
    if hasattr(module, "processor"):
        return f"its processor is {type(module.processor).__name__}"
    is_leaf = next(module.children(), None) is None
    return "there is no op for it" if is_leaf and next(module.parameters(), None) is not None else None


def _why_not_fused(scheduler: Any) -> str | None:
    import diffusers

    name = type(scheduler).__name__
    known = isinstance(scheduler, FusedScheduler) or (
        name in FUSED and getattr(diffusers, name, None) is type(scheduler)
    )
    return FUSED[name].why_not(scheduler) if known else "its steps are no table of coefficients that diffkern has"


@functools.cache
def _check_version() -> None:
    """Warn, once, of a version that nobody has tried."""
    installed = version("diffusers")
    numbers = tuple(int(n) for n in installed.split(".")[:2])
    if not TESTED[0] <= numbers <= TESTED[1]:
        first, last = (".".join(map(str, v)) for v in TESTED)
        warnings.warn(
            f"diffkern was tested with diffusers {first} to {last}, not with {installed}: parts that have changed may "
            "run as they are, or fail",
            stacklevel=3,
        )

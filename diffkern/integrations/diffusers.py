"""diffusers schedulers whose steps are single fused ops: `pipe.scheduler = fuse_scheduler(pipe.scheduler)`.

A fused scheduler is a subclass of the scheduler's own class, under its name: timesteps, sigmas, saving and loading stay
diffusers'. Its state is kept where diffusers keeps it, so a run can be fused, and taken apart again, at any step.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

from diffkern.integrations.schedulers.alpha import DDIM, DDPM, LCM, PNDM
from diffkern.integrations.schedulers.fused import FusedScheduler, NoRow
from diffkern.integrations.schedulers.multistep import DEIS, DPMSolver, DPMSolverSinglestep, EDMDPMSolver
from diffkern.integrations.schedulers.sigma import EDMEuler, Euler, EulerAncestral, FlowMatchEuler, Heun
from diffkern.integrations.schedulers.unipc import UniPC
from diffkern.schedules import one_of

FUSED: dict[str, type[FusedScheduler]] = {
    "DDPMScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "PNDMScheduler": PNDM,
    "LCMScheduler": LCM,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "HeunDiscreteScheduler": Heun,
    "EDMEulerScheduler": EDMEuler,
    "DPMSolverMultistepScheduler": DPMSolver,
    "DPMSolverSinglestepScheduler": DPMSolverSinglestep,
    "EDMDPMSolverMultistepScheduler": EDMDPMSolver,
    "DEISMultistepScheduler": DEIS,
    "UniPCMultistepScheduler": UniPC,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEuler,
}


def fuse_scheduler(scheduler: Any, *, noise: str = "diffusers", seed: int = 0) -> Any:
    """A copy of a diffusers scheduler, of the same interface, config and state, whose `step` and `add_noise` (of a flow
    `scale_noise`) are one pass over memory each, of `sampler_step` (a flow's Euler: one addition), without waiting for
    the device.

    scheduler: an instance of one of FUSED. noise: "diffusers" draws what diffusers would, from the `generator` of a
    call; "counter" draws sample i's noise from (seed, i) inside the op (see `diffkern.randn`), the same in any batch
    and on any device, and does not use the generator.
    Sums are made in float32 whatever the model's dtype. What multistep schedulers keep of past steps is in float32,
    what others keep in the sample's dtype, as in diffusers. On a CPU runs are faster than diffusers' or as fast, but
    for Heun's of small samples: its few operations take less time there than the way to one. Calls that no row of a
    table describes run as in diffusers: before `set_timesteps` where that is needed, with FlowMatchEuler's
    per_token_timesteps, EDMEuler's pred_original_sample, without the scale_model_input that Euler asks for, or where
    noise levels are too near to each other, of which a warning tells.
    Raises ValueError, naming what is allowed, for another scheduler, an option that is not a table of coefficients
    (thresholding, learned variances), or another noise."""
    one_of("noise", noise, ("diffusers", "counter"))
    cls = _plain_class(type(scheduler))
    if cls is None:
        raise ValueError(
            f"{type(scheduler).__name__} cannot be fused: it must be one of {', '.join(FUSED)} of diffusers"
        )
    if (reason := FUSED[cls.__name__].why_not(scheduler)) is not None:
        raise ValueError(f"{cls.__name__} cannot be fused: {reason}")
    fused = _copy_as(fused_class(cls), scheduler)
    fused.counter_seed = seed if noise == "counter" else None
    return fused


def restore_scheduler(scheduler: Any) -> Any:
    """A copy of a fused scheduler in diffusers' own class, with the same config and state. Raises ValueError for a
    scheduler that is not fused."""
    cls = _plain_class(type(scheduler))
    if cls is None or cls is type(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} is not fused: restore_scheduler takes what fuse_scheduler returned"
        )
    plain = _copy_as(cls, scheduler)
    vars(plain).pop("counter_seed", None)
    return plain


@functools.cache
def fused_class(cls: Any) -> Any:
    """The fused subclass of a diffusers scheduler class. One made with options that cannot be fused warns once, and
    steps as diffusers does."""
    family, bound = FUSED[cls.__name__], _binder(inspect.signature(cls.step))
    output = getattr(sys.modules[cls.__module__], family.output)
    warned: set[str] = set()

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = bound(self, args, kwargs)
        reason = self.look().reason
        if reason is None and self.is_regular(call):
            try:
                results = self.fused_step(**call)
                return output(*results) if call["return_dict"] else results
            except NoRow as missing:
                reason = str(missing)
        if reason is not None and reason not in warned:
            warned.add(reason)
            warnings.warn(f"{cls.__name__} steps as in diffusers: {reason}", stacklevel=2)
        return cls.step(self, *args, **kwargs)

    def __reduce__(self: Any) -> Any:
        return _new, (cls,), self.__getstate__()

    # The name and module are diffusers' own: they are what a saved scheduler and pipeline are loaded by.
    body = {"step": step, "__reduce__": __reduce__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (family, cls), body)


def _binder(signature: inspect.Signature) -> Callable[..., dict[str, Any]]:
    """The arguments of a call by their names, with defaults; as Signature.bind, which is ten times slower."""
    _, *parameters = signature.parameters.values()
    names = [p.name for p in parameters]
    known = set(names)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def bind(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = {**defaults, **kwargs}
        call.update(zip(names, args, strict=False))
        if call.keys() != known or len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            signature.bind(self, *args, **kwargs)  # it knows what to say
        return call

    return bind


def _new(cls: Any) -> Any:
    """An empty fused scheduler: what pickle and deepcopy start from, since its class is found under no name."""
    fused = fused_class(cls)
    return fused.__new__(fused)


def _plain_class(cls: Any) -> Any:
    """The diffusers class that is cls, or that cls fuses; None if there is none. Not a subclass of one: it may step
    otherwise."""
    import diffusers

    plain = getattr(diffusers, cls.__name__, None) if cls.__name__ in FUSED else None
    return plain if plain is not None and cls in (plain, fused_class(plain)) else None


def _copy_as(cls: Any, scheduler: Any) -> Any:
    state = scheduler.__getstate__() if isinstance(scheduler, FusedScheduler) else vars(scheduler)
    made = cls.__new__(cls)
    vars(made).update(copy.deepcopy(state))
    return made

"""Whole networks, whose calls are recorded and replayed. What they compute is their parts' matter."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffkern.graphs import kept
from diffkern.graphs.calls import NAME, Calls
from diffkern.graphs.looks import is_plain
from diffkern.integrations.modules.base import Accelerated

# Networks that take a number, or a tensor on the CPU, for a timestep: in which dtypes they make tensors of an int and
# of a float.
_NUMBERS = {
    "UNet2DModel": (torch.int64, torch.int64),
    "UNet2DConditionModel": (torch.int64, torch.float64),
    "ControlNetModel": (torch.int64, torch.float64),
}


class Network(Accelerated):
    """As it was, but that a call like those before it is replayed, where the device has graphs."""

    replaces = (
        "diffusers.UNet2DModel",
        "diffusers.UNet2DConditionModel",
        "diffusers.ControlNetModel",
        "diffusers.DiTTransformer2DModel",
        "diffusers.PixArtTransformer2DModel",
        "diffusers.SD3Transformer2DModel",
        "diffusers.SD3ControlNetModel",
        "diffusers.FluxTransformer2DModel",
        "diffusers.FluxControlNetModel",
        "diffusers.WanTransformer3DModel",
        "diffusers.LTXVideoTransformer3DModel",
        "diffusers.models.autoencoders.vae.Encoder",
        "diffusers.models.autoencoders.vae.Decoder",
        "diffusers.models.autoencoders.vae.EncoderTiny",
        "diffusers.models.autoencoders.vae.DecoderTiny",
    )
    ops = ()
    cuda_graph: ClassVar[bool | str] = "auto"

    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[self.first]
        if torch.compiler.is_compiling() or not is_plain(x):
            return NotImplemented
        if not kept.has_graphs(x.device):
            vars(self).pop(NAME, None)  # of the device that the network was on
            return NotImplemented
        if self.plain.__name__ in _NUMBERS:
            args, kwargs = _with_tensor(self.plain.__name__, args, kwargs, x)
        calls = vars(self).get(NAME)
        if calls is None:
            calls = vars(self)[NAME] = Calls(self, self.cuda_graph)
        return calls(functools.partial(self.plain.forward, self), args, kwargs, x)

    @property
    def dtype(self: Any) -> torch.dtype:
        """As diffusers says, which asks each of hundreds of modules for hooks, in every call of a UNet2DModel."""
        from diffusers.models.modeling_utils import get_parameter_dtype

        first = next(self.parameters(), None)
        told = getattr(self, "_keep_in_fp32_modules", None) or torch.compiler.is_compiling() or _has_hooks(self)
        if told or first is None or not first.is_floating_point():
            return get_parameter_dtype(self)
        return first.dtype


def _has_hooks(module: Any) -> bool:
    """Whether diffusers has hooks on a module or on a part of it, which may cast its weights."""
    state = vars(module)
    return "_diffusers_hook" in state or any(_has_hooks(m) for m in state["_modules"].values() if m is not None)


class AlwaysNetwork(Network):
    """The same as soon as can be, and with classes of which nothing is known."""

    cuda_graph = True


def _with_tensor(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the timestep, the second of them, as the tensor that the network would make of a
    number. It is filled on the device, which does not have to wait for the host."""
    t: Any = args[1] if len(args) > 1 else kwargs.get("timestep")
    if isinstance(t, Tensor) and is_plain(t) and t.device.type == "cpu" and t.dim() == 0:
        made = torch.full((1,), t.item(), dtype=t.dtype, device=x.device)
    elif type(t) in (int, float):
        made = torch.full((1,), t, dtype=_NUMBERS[name][type(t) is float], device=x.device)
    else:
        return args, kwargs
    return ((args[0], made, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "timestep": made})

"""What accelerated modules share. A diffusers module is accelerated by its class alone: it becomes a subclass of what
it was, under the same name, whose forward runs in ops. Parameters, children, hooks and config stay the same objects,
and the old class brings everything back.

A module that the user has changed (a LoRA layer in place of a linear one, a hook, a quantised weight) is called as the
module that it is; what is fused is only what is known.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.backend import use_backend
from diffkern.dispatch import is_for_ops
from diffkern.graphs.calls import NAME
from diffkern.models import blocks
from diffkern.ops.conv2d import conv2d
from diffkern.ops.linear import activate, linear
from diffkern.ops.query_key_value import query_key_value

_ANY: AbstractContextManager[None] = nullcontext()


class Accelerated:
    """Mixed into a module's class, in front of it."""

    replaces: ClassVar[tuple[str, ...]]  # the classes that this stands in for, by their full names
    ops: ClassVar[tuple[str, ...]]  # that a call may run
    plain: ClassVar[Any]  # the class that it stands in for
    first: ClassVar[str]  # the name of the first argument of its forward
    backend: ClassVar[str] = "auto"

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """The reason that a module's options keep it from being fused, or None."""
        return None

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        """The forward in ops, or NotImplemented for a call that only the module's own forward takes."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(self.first)
        if isinstance(x, Tensor) and is_for_ops(x) and not is_for_training(self, args, kwargs):
            with self.on_backend():
                result = self.fused(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.plain.forward(self, *args, **kwargs)

    def on_backend(self) -> AbstractContextManager[None]:
        """Runs ops on the backend that was asked for; with none, on the one that the caller may have asked for."""
        return _ANY if self.backend == "auto" else use_backend(self.backend)


@functools.cache
def accelerated_class(part: Any, plain: Any, backend: str) -> Any:
    """The subclass of a module class that runs as `part` says, on a backend or on the best one ("auto")."""

    def __reduce__(self: Any) -> Any:
        return _new, (part, plain, backend), {k: v for k, v in vars(self).items() if k != NAME}

    run: Any = Accelerated.forward
    body = {
        "plain": plain,
        "backend": backend,
        "first": next(name for name in inspect.signature(plain.forward).parameters if name != "self"),
        # A function of its own, which says whose arguments it takes: pipelines ask a network.
        "forward": functools.wraps(plain.forward)(FunctionType(run.__code__, run.__globals__)),
        # A saved config names the class, and a pipeline is loaded by it.
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce__": __reduce__,
    }
    return type(plain.__name__, (part, plain), body)


def _new(part: Any, plain: Any, backend: str) -> Any:
    """An empty module: what pickle and deepcopy start from, since its class is found under no name."""
    cls = accelerated_class(part, plain, backend)
    return cls.__new__(cls)


def become(module: Any, cls: Any) -> None:
    """Give a module another class, and free its graphs. Offload hooks keep the forward that they wrap, and leave it as
    an attribute: that becomes another, too."""
    vars(module).pop(NAME, None)
    forward, module.__class__ = type(module).forward, cls
    for name in ("forward", "_old_forward"):
        kept = vars(module).get(name)
        if isinstance(kept, MethodType) and kept.__func__ is forward:
            setattr(module, name, MethodType(cls.forward, module))


def is_for_training(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has to leave a way back for gradients: then the module's own forward runs."""
    if not torch.is_grad_enabled():
        return False
    given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    return any(t.requires_grad for t in given) or any(p.requires_grad for p in module.parameters())


def takes(weight: Any, x: Tensor) -> bool:
    """Whether a weight is one that ops know, and of the dtype of x; a quantised one is not."""
    return weight is None or (type(weight) is nn.Parameter and weight.dtype is x.dtype)


def is_plain(module: Any, cls: Any) -> bool:
    """Whether a module is a cls, or an accelerated one, that does what its class says and no more: its parts may be
    used in place of a call."""
    own, state = type(module), vars(module)
    if getattr(own, "plain", own) is not cls or state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return False
    return "forward" not in state or getattr(state["forward"], "__func__", None) is own.forward


def is_part(module: Any, part: type[Accelerated]) -> bool:
    """Whether a module is accelerated as `part` says, and nothing around it was changed."""
    return isinstance(module, part) and is_plain(module, module.plain)


def is_silent(dropout: Any) -> bool:
    """Whether a dropout layer passes its input on."""
    return is_plain(dropout, nn.Dropout) and not (dropout.training and dropout.p > 0)


def project(
    layer: Any, x: Tensor, activation: str = "none", residual: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """activation(layer(x)) * gate + residual for tokens x: [B, ..., K], in one op if the layer is a plain linear one,
    else by a call of it. residual: [B, ..., N]. gate: [B, N]."""
    if is_plain(layer, nn.Linear) and takes(layer.weight, x):
        return linear(x, layer.weight, layer.bias, activation, residual, gate)
    return gated(activate(layer(x), activation), residual, gate)


def gated(y: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """y * gate + residual, each if given, where no op can do it on the way. y, residual: [B, ..., N]. gate: [B, N]."""
    y = y if gate is None else y * gate.unflatten(-1, (*(1,) * (y.dim() - 2), -1))
    return y if residual is None else y + residual


def project_all(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values of tokens that attend to themselves: in one product if the three layers are plain linear
    ones of one shape. x: [B, ..., K]. Returns three of [B, ..., N]."""
    first = layers[0]
    alike = all(
        is_plain(layer, nn.Linear)
        and takes(layer.weight, x)
        and layer.weight.shape == first.weight.shape
        and (layer.bias is None) == (first.bias is None)
        for layer in layers
    )
    if not alike:
        return [project(layer, x) for layer in layers]
    weights, biases = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
    return query_key_value(x, *weights, *biases).unbind(-2)


def is_simple(conv: Any) -> bool:
    """Whether a convolution is one that the op has: with a stride, and zeros around."""
    return bool(
        conv.groups == 1
        and conv.padding_mode == "zeros"
        and tuple(conv.dilation) == (1, 1)
        and conv.stride[0] == conv.stride[1]
    )


def convolve(
    conv: Any, x: Tensor, residual: Tensor | None = None, upsample: bool = False, pad: tuple[int, ...] = (0, 0, 0, 0)
) -> Tensor:
    """conv(x) + residual, in one op if it is a plain convolution, else by a call of it. x: [B, C, H, W], whose H and W
    are doubled first if upsample. pad: zeros for the left, right, top and bottom, beside the convolution's own."""
    if is_plain(conv, nn.Conv2d) and is_simple(conv) and takes(conv.weight, x):
        return convolve_plain(conv, x, residual, upsample, pad)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    y = conv(F.pad(x, pad) if any(pad) else x)
    return y if residual is None else y + residual


def convolve_plain(conv: Any, x: Tensor, residual: Tensor | None, upsample: bool, pad: tuple[int, ...]) -> Tensor:
    """The op with a convolution's parameters. Its result is channels_last, as every op after it reads it fastest."""
    own = conv._reversed_padding_repeated_twice
    sides = [a + b for a, b in zip(own, pad, strict=True)] if any(pad) else list(own)
    x = x.contiguous(memory_format=torch.channels_last)
    return conv2d(x, conv.weight, conv.bias, conv.stride[0], sides, residual=residual, upsample=upsample)


def norm_silu(
    norm: Any, x: Tensor, silu: bool = True, add: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """silu(norm(x + add) * (1 + scale) + shift), in one op if the norm is a plain GroupNorm, else by a call of it.
    x: [B, C, H, W]. add, scale, shift: [B, C]."""
    if is_plain(norm, nn.GroupNorm) and takes(norm.weight, x):
        return blocks.norm_silu(norm, x, silu, add=add, scale=scale, shift=shift)
    y = norm(x if add is None else x + add[:, :, None, None])
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y

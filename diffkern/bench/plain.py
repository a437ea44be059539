"""What one would write in PyTorch in place of an op, in the tensors' own dtype and with PyTorch's own generator: what a
kernel has to beat, eager, compiled, and as other libraries convert it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkern.layout import per_channel, per_sample
from diffkern.op import Op
from diffkern.ops.sampler_step import C_IN, MAKES_INPUT, NOISE, sampler_step


def torch_randn(keys: Tensor, shape: list[int], draw: int, dtype: torch.dtype, offset: int) -> Tensor:
    return torch.randn(keys.shape[0], *shape, dtype=dtype, device=keys.device)


def torch_add_noise(x0: Tensor, t: Tensor, table: Tensor, keys: Tensor, draw: int, more: bool) -> tuple[Tensor, ...]:
    alpha, sigma = table[t].to(x0.dtype).unbind(-1)
    noise = torch.randn_like(x0)
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise, noise


def torch_reparameterize(mean: Tensor, logvar: Tensor, keys: Tensor, draw: int) -> Tensor:
    return mean + torch.exp(logvar / 2) * torch.randn_like(mean)


def torch_group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    add: Tensor | None, scale: Tensor | None, shift: Tensor | None, skip: Tensor | None, *moments: Tensor | None,
) -> Tensor:  # fmt: skip
    x = x if skip is None else torch.cat([x, skip], dim=1)
    x = x if add is None else x + per_channel(add, x)
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + per_channel(scale, y)) + per_channel(shift, y)
    return F.silu(y) if silu else y


def torch_layer_norm_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if scale is None or shift is None else y * (1 + scale[:, None]) + shift[:, None]


def torch_gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    r = x + gate[:, None] * y
    return r, torch_layer_norm_modulate(r, shift, scale, *rest)


def torch_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def torch_sampler_step(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, keys: Tensor | None, guidance: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The reference without noise, and torch's noise after it."""
    *state, results = rest
    if keys is None:
        return sampler_step.reference(x, model_output, table, row, None, guidance, *rest)
    x_next, _, *more = sampler_step.reference(
        x, model_output, table, row, None, guidance, *state, (15 if results is None else results) & ~MAKES_INPUT
    )
    x_next = x_next + per_sample(table[row, NOISE], x) * torch.randn_like(x)
    model_input = (per_sample(table[row + 1, C_IN], x) * x_next).to(model_output.dtype)
    return x_next, model_input if guidance is None else torch.cat([model_input, model_input]), *more


def torch_vlb_term(x0: Tensor, x_t: Tensor, model_output: Tensor, table: Tensor, timestep: Tensor) -> Tensor:
    """Both kinds of a term, then one of them a sample, as in the code of Nichol & Dhariwal 2021."""
    a, b, clip, c1, k0, var, low, high, width = (per_sample(c, x0).to(x0.dtype) for c in table[timestep, :9].unbind(1))
    m, *learned = model_output.split(x0.shape[1], 1)
    logvar = low + (learned[0] + 1) / 2 * (high - low) if learned else high
    gap = x0 - (a * x_t + b * m).clamp(-clip, clip)
    kl = 0.5 * (k0 + logvar + (var + (c1 * gap) ** 2) * torch.exp(-logvar))
    inverse = torch.exp(-logvar / 2)

    def below(z: Tensor) -> Tensor:  # the normal distribution, by its usual approximation
        return 0.5 * (1 + torch.tanh(0.7978845608 * (z + 0.044715 * z**3)))

    upper, lower = below((gap + width) * inverse), below((gap - width) * inverse)
    mass = torch.where(x0 <= width - 1, upper, torch.where(x0 >= 1 - width, 1 - lower, upper - lower))
    return torch.where(width > 0, -mass.clamp(min=1e-12).log(), kl).flatten(1).sum(1)


def torch_query_key_value(x: Tensor, *rest: Tensor | None) -> Tensor:
    weights, biases = cast(tuple[Tensor, ...], rest[:3]), rest[3:]
    return torch.stack([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -2)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2).flatten(2)


def autograd_group_norm_silu(x: Tensor, grad: Tensor, groups: int, *rest: Any) -> Callable[[], Any]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *rest[:2], *rest[4:])]
    first, weight, bias, *more = leaves
    assert first is not None
    with torch.enable_grad():
        y = torch_group_norm_silu(first, groups, weight, bias, rest[2], rest[3], *more)
    wanted = [t for t in leaves if t is not None]
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def autograd_layer_norm_modulate(
    grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float
) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in (x, scale, weight) if t is not None]
    own = None if weight is None else leaves[-1]
    with torch.enable_grad():
        y = F.layer_norm(leaves[0], x.shape[-1:], own, None, eps)
        y = y if scale is None else y * (1 + leaves[1][:, None])
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


# Of a gradient only the way back is timed: called once with the op's arguments, each gives the call to time.
AUTOGRAD: dict[str, Callable[..., Callable[[], Any]]] = {
    "group_norm_silu_backward": autograd_group_norm_silu,
    "layer_norm_modulate_backward": autograd_layer_norm_modulate,
}

PLAIN: dict[str, Callable[..., Any]] = {
    "randn": torch_randn,
    "add_noise": torch_add_noise,
    "reparameterize": torch_reparameterize,
    "sampler_step": torch_sampler_step,
    "group_norm_silu": torch_group_norm_silu,
    "layer_norm_modulate": torch_layer_norm_modulate,
    "gate_residual_norm_modulate": torch_gate_residual_norm_modulate,
    "rms_norm": torch_rms_norm,
    "vlb_term": torch_vlb_term,
    "query_key_value": torch_query_key_value,
    "attention": torch_attention,
}


PRODUCTS = ("linear", "query_key_value", "conv2d", "attention")
"""The ops whose floor is arithmetic."""


def composed(op: Op) -> Callable[..., Any]:
    """What one would write: from here, or else what the op has of PyTorch's own calls, or else its reference."""
    own = next((b.run for b in op.backends if b.name == "torch"), op.reference)
    return PLAIN.get(op.name, own)


class OneOp(nn.Module):
    """A network of one op, as one would write it: the weights and biases among the arguments are
    its own, the other tensors are its inputs, and the rest is in its code."""

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.function = composed(op)
        self.args: list[Any] = [None if isinstance(a, Tensor) else a for a in args]
        self.own: dict[int, str] = {}
        self.given: list[int] = []
        self.inputs: tuple[Tensor, ...] = ()
        for (name, i), a in zip(op.positions.items(), args, strict=True):
            if isinstance(a, Tensor) and name.endswith(("weight", "bias")):
                self.register_buffer(name, a.contiguous())  # of bfloat16, OpenVINO reads no strides
                self.own[i] = name
            elif isinstance(a, Tensor):
                self.given.append(i)
                self.inputs += (a.contiguous(),)
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        args = list(self.args)
        for i, name in self.own.items():
            args[i] = getattr(self, name)
        for i, t in zip(self.given, inputs, strict=True):
            args[i] = t
        return self.function(*args)


def convertible(op: Op, args: tuple[Any, ...]) -> bool:
    """Whether libraries that convert networks can have a call: no gradient, and no noise, of which nobody could say
    whether it is right."""
    return op.name not in AUTOGRAD and ("keys" not in op.positions or args[op.positions["keys"]] is None)

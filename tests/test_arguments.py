"""A wrong argument gets one sentence that names the op, what was given and what is allowed: the same on every backend.
None is left to a kernel that would read past the end of a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern import noise_keys, use_backend
from diffkern.available import availability
from diffkern.op import OPS
from diffkern.testing import make

X = make((2, 4, 6, 6), "cpu", torch.float32)
R, V = make((2, 4, 6), "cpu", torch.float32), make((2, 6), "cpu", torch.float32)
TABLE = make((5, 32), "cpu", torch.float32)
TERMS = TABLE[:, :16].contiguous()
KEYS, ROW, SCHEDULE = noise_keys(0, 2), torch.tensor([0, 3]), torch.rand(10, 2)
Q = make((2, 5, 3, 8), "cpu", torch.float32)
STEP = (X, X, TABLE, ROW, KEYS, None, None, None, None, None, None)


def step(**other) -> tuple:
    return tuple(other.get(name, a) for name, a in zip(OPS["sampler_step"].signature.parameters, STEP, strict=True))


def qkv(**changes: Any) -> tuple[Any, ...]:
    weights = {f"{name}_weight": torch.ones(3, 6) for name in "qkv"}
    return tuple({"x": X, **weights, **{f"{name}_bias": torch.ones(3) for name in "qkv"}, **changes}.values())


def norm(**other) -> tuple:
    return OPS["group_norm_silu"].bind(X, 2, **other)


def conv(**other) -> tuple:
    args = {"x": X, "weight": torch.ones(3, 4, 3, 3), **other}
    return OPS["conv2d"].bind(**args)


WRONG = [
    ("randn", (KEYS[:, :1], [4], 0, torch.float32, 0), r"keys must be contiguous int64 \[2, 2\], got \[2, 1\]"),
    ("randn", (KEYS.int(), [4], 0, torch.float32, 0), r"keys must be contiguous int64 \[2, 2\]"),
    ("randn", (KEYS, [4, -1], 0, torch.float32, 0), "shape has the size -1"),
    ("randn", (KEYS, [4], 0, torch.float32, -4), "offset is -4, allowed are 0 and above"),
    ("add_noise", (X, torch.tensor([0, 10]), SCHEDULE, KEYS, 0, False), r"timestep\[1\] is 10, allowed are 0 to 9"),
    ("add_noise", (X, torch.tensor([-1, 0]), SCHEDULE, KEYS, 0, False), r"timestep\[0\] is -1, allowed are 0 to 9"),
    ("add_noise", (X, torch.tensor([0]), SCHEDULE, KEYS, 0, False), r"timestep must be contiguous int64 \[2\]"),
    ("add_noise", (X, ROW, torch.rand(10), KEYS, 0, False), r"alpha_sigma must be \[T, 2\], got \[10\]"),
    ("reparameterize", (X, X, noise_keys(0, 3), 0), r"keys must be contiguous int64 \[2, 2\], got \[3, 2\]"),
    ("sampler_step", step(row=torch.tensor([0, 4])), r"row\[1\] is 4, allowed are 0 to 3"),
    ("sampler_step", step(table=TABLE[:, :31].contiguous()), r"table must be \[R \+ 1, 32\].*got \[5, 31\]"),
    ("sampler_step", step(guidance=torch.ones(2)), r"model_output must have batch 4 .* got \[2, 4, 6, 6\]"),
    ("sampler_step", step(model_output=torch.cat([X, X])), r"model_output must have batch 2 .* got \[4, 4, 6, 6\]"),
    (
        "sampler_step",
        step(guidance=torch.ones(1), model_output=torch.cat([X, X])),
        r"guidance must be \[2\], got \[1\]",
    ),
    ("sampler_step", step(h0=X[:, :3].contiguous()), r"h0 must have batch 2 and otherwise the shape .*\[2, 3, 6, 6\]"),
    ("sampler_step", step(base=X.half()), "base has the wrong dtype"),
    ("attention", (Q[0], Q, Q, None, None), r"q must be \[B, S, H, D\], got \[5, 3, 8\]"),
    ("attention", (Q, Q[:, :4], Q, None, None), r"v must be \[2, 4, 3, 8\], got \[2, 5, 3, 8\]"),
    ("attention", (Q, Q[:, :, :1], Q, None, None), r"k must be \[2, 5, 3, 8\], got \[2, 5, 1, 8\]"),
    ("group_norm_silu", (X, 3, None, None, 1e-5, True), "num_groups is 3, allowed are the divisors of the 4 channels"),
    ("group_norm_silu", (X, 0, None, None, 1e-5, True), "num_groups is 0"),
    ("linear", (X, torch.ones(3, 5), None, "none", None, None), r"weight must be \[N, 6\], got \[3, 5\]"),
    ("linear", (X, torch.ones(3, 6), None, "geglu", None, None), r"weight must be \[2 N, 6\], got \[3, 6\]"),
    ("linear", (X, torch.ones(3, 6), torch.ones(4), "none", None, None), r"bias must be \[3\], got \[4\]"),
    ("linear", (X, torch.ones(3, 6), None, "relu", None, None), "activation must be one of none, silu, .*'relu'"),
    ("linear", (X, torch.ones(3, 6), None, "none", X, None), r"residual must be \[2, 4, 6, 3\], got \[2, 4, 6, 6\]"),
    ("linear", (X, torch.ones(3, 6), None, "none", None, torch.ones(3)), r"gate must be \[2, 3\], got \[3\]"),
    ("query_key_value", qkv(k_weight=torch.ones(2, 6)), r"k_weight must be \[3, 6\], got \[2, 6\]"),
    ("query_key_value", qkv(q_weight=torch.ones(3, 5)), r"q_weight must be \[N, 6\], got \[3, 5\]"),
    ("query_key_value", qkv(v_bias=torch.ones(4)), r"v_bias must be \[3\], got \[4\]"),
    ("query_key_value", qkv(v_bias=None), "a bias must be given to all three or to none, got none of v"),
    ("query_key_value", qkv(x=X[0, 0, 0]), r"x must be \[B, ..., K\], got \[6\]"),
    ("conv2d", conv(weight=torch.ones(3, 5, 3, 3)), r"weight must be \[N, 4, R, S\], got \[3, 5, 3, 3\]"),
    ("conv2d", conv(bias=torch.ones(4)), r"bias must be \[3\], got \[4\]"),
    ("conv2d", conv(stride=0), "stride must be 1 and above, got 0"),
    ("conv2d", conv(padding=[1, 1]), r"padding must be None, one number or four, .* got \[1, 1\]"),
    ("conv2d", conv(weight=torch.ones(3, 4, 9, 9), padding=[0]), "x must be at least as large as the kernel"),
    ("conv2d", conv(add=torch.ones(2, 4)), r"add must be \[2, 3\], got \[2, 4\]"),
    ("conv2d", conv(residual=X), r"residual must be \[2, 3, 6, 6\], got \[2, 4, 6, 6\]"),
    ("conv2d", conv(activation="gelu"), "activation must be none or silu, got 'gelu'"),
    ("layer_norm_modulate", (X, None, None, None, None, 1e-6), r"x must be contiguous \[B, T, C\], got \[2, 4, 6, 6\]"),
    ("layer_norm_modulate", (R, V, None, None, None, 1e-6), "give shift and scale together or neither"),
    ("layer_norm_modulate", (R, V, V[:1], None, None, 1e-6), r"scale must be \[2, 6\], got \[1, 6\]"),
    ("layer_norm_modulate", (R, None, None, V[0, :5], None, 1e-6), r"weight must be \[6\], got \[5\]"),
    ("layer_norm_modulate_backward", (R[:, :3], R, V, None, 1e-6), r"grad must have batch 2 and .*, got \[2, 3, 6\]"),
    ("gate_residual_norm_modulate", (R, R[:, :3], V, V, V, None, None, 1e-6), r"y must have batch 2 .*got \[2, 3, 6\]"),
    ("gate_residual_norm_modulate", (R, R, V[:, :5], V, V, None, None, 1e-6), r"gate must be \[2, 6\], got \[2, 5\]"),
    ("rms_norm", (R, V[0, :5], 1e-6), r"weight must be \[6\], got \[5\]"),
    (
        "qk_norm_rope",
        (R, R, None, None, None, None, True, 1e-6),
        r"q must be contiguous \[B, S, H, D\], got \[2, 4, 6\]",
    ),
    ("qk_norm_rope", (X, X[:, :3], None, None, None, None, True, 1e-6), r"k must be contiguous \[2, 4, Hk, 6\]"),
    ("qk_norm_rope", (X, X, None, None, V, None, True, 1e-6), "give cos and sin together or neither"),
    ("qk_norm_rope", (X, X, None, None, V, V, True, 1e-6), r"cos must be \[4, 6\], got \[2, 6\]"),
    ("qk_norm_rope", (X[..., :5], X[..., :5], None, None, R[0, :, :5], R[0, :, :5], True, 1e-6), "D is 5, a rotation"),
    ("timestep_embedding", (V, 8, True, 0.0, 1e4), r"timestep must be \[B\], got \[2, 6\]"),
    ("timestep_embedding", (V[0], -1, True, 0.0, 1e4), "dim is -1, allowed are 0 and above"),
    ("group_norm_silu", (X, 2, torch.ones(3), torch.ones(3), 1e-5, True), r"weight must be \[4\], got \[3\]"),
    ("group_norm_silu", (X, 2, None, None, 1e-5, True, X[:, :, 0, 0][:, :3]), r"add must be \[2, 4\], got \[2, 3\]"),
    ("group_norm_silu", (X, 2, None, None, 1e-5, True, None, X[:1, :, 0, 0], X[:, :, 0, 0]), "scale must be "),
    ("group_norm_silu", (X, 2, None, None, 1e-5, True, None, None, None, X[..., :2]), "skip must have the dtype and"),
    ("group_norm_silu", norm(moments=torch.ones(2, 5, 7)), r"moments must be \[2, 5, 8\], got \[2, 5, 7\]"),
    ("group_norm_silu", norm(moments=torch.ones(2, 37, 8)), r"moments must be \[2, chunks of pixels, 8\], got"),
    ("group_norm_silu", norm(moments=torch.ones(2, 5, 8), skip=X), "give the moments of x, and of skip if there is"),
    ("vlb_term", (X, X, X[:, :3], TERMS, ROW), r"model_output must have 4 or 8 channels .*got \[2, 3, 6, 6\]"),
    ("vlb_term", (X, X, X[:1], TERMS, ROW), r"model_output must have 4 or 8 channels .*\[2, 4, 6, 6\], got \[1, 4, "),
    ("vlb_term", (X, X[:, :3], X, TERMS, ROW), r"x_t must have batch 2 and otherwise the shape \[2, 4, 6, 6\]"),
    ("vlb_term", (X, X, X, TABLE, ROW), r"table must be \[T, 16\], got \[5, 32\]"),
    ("vlb_term", (X, X, X, TERMS, torch.tensor([0, 5])), r"timestep\[1\] is 5, allowed are 0 to 4"),
    ("group_norm_silu_backward", (X, X[:1], 2), r"grad must have batch 2 and otherwise the shape"),
]


@pytest.mark.parametrize("backend", ["cpu", "triton", "torch", "reference"])
@pytest.mark.parametrize(("name", "args", "sentence"), WRONG)
def test_every_backend_refuses_with_the_same_sentence(name, args, sentence, backend):
    op = OPS[name]
    found = next((b for b in op.all_backends() if b.name == backend), None)
    if found is None:
        pytest.skip(f"{name} has no {backend} backend")
    if (reason := availability(backend)) is not None or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip(reason or "these tensors are on the CPU")
    with use_backend(backend), pytest.raises(RuntimeError, match=f"^diffkern::{name}: .*{sentence}"):
        op.overload(*op.bind(*args))


@pytest.mark.parametrize(("name", "args", "sentence"), WRONG)
def test_training_refuses_with_the_same_sentence(name, args, sentence):
    op = OPS[name]
    args = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    if any(isinstance(a, Tensor) and a.requires_grad for a in args):
        with pytest.raises(RuntimeError, match=f"^diffkern::{name}: .*{sentence}"):
            op(*args)

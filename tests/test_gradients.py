"""Gradients: of every op against finite differences in float64, and of the native ones against the reference's."""

from __future__ import annotations

import pytest
import torch

import diffkern
from diffkern.op import OPS
from diffkern.testing import make, tensors, ulp


def float64_call(op):
    """The smallest call with something to differentiate: its floating tensors, and a function of them."""
    samples = [s.args() for s in op.make_samples("cpu", torch.float64) if not s.workload]
    args = min((a for a in samples if grads(op, a) and all(a[i].numel() for i in grads(op, a))), key=size)
    index = grads(op, args)

    def run(*floats):
        full = list(args)
        for i, value in zip(index, floats, strict=True):
            full[i] = value
        return tuple(t for t in tensors(op(*full)) if t.requires_grad)

    return run, [args[i].detach().clone().requires_grad_() for i in index]


def grads(op, args):
    """Where the floating tensors are that have a gradient: the tables of a schedule have none."""
    named = enumerate(zip(op.signature.parameters, args, strict=True))
    tables = ("table", "alpha_sigma")
    return [i for i, (n, a) in named if isinstance(a, torch.Tensor) and a.is_floating_point() and n not in tables]


def size(args):
    return sum(a.numel() for a in args if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("name", [n for n in OPS if n != "randn"])
def test_gradients_equal_finite_differences(name):
    run, inputs = float64_call(OPS[name])
    many = sum(t.numel() for t in inputs) > 1000  # of which a random direction is followed, not each
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_gradient_of_reparameterize_is_the_references(dtype):
    keys = diffkern.noise_keys(0, 3)

    def gradients(function):
        mean, logvar = (make((3, 4, 5, 5), "cpu", dtype, seed=s).requires_grad_() for s in (0, 1))
        weight = make((3, 4, 5, 5), "cpu", dtype, seed=2)
        (function(mean, logvar, keys, 7) * weight).sum().backward()
        return mean.grad, logvar.grad

    ours, theirs = gradients(diffkern.reparameterize), gradients(diffkern.reparameterize.reference)
    assert torch.equal(ours[0], theirs[0])
    # one rounding of the result; the noise itself is within a few units of float32
    assert ((ours[1].double() - theirs[1].double()).abs() <= 2 * ulp(theirs[1], dtype) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["nothing", "modulation", "affine", "everything"])
def test_the_native_gradient_of_layer_norm_modulate_is_the_references(dtype, given):
    def gradients(function, dtype):
        inputs = [make((3, 70, 24), "cpu", torch.float32, seed=0).to(dtype)]
        for i in range(2):
            inputs.append(make((3, 24), "cpu", torch.float32, seed=1 + i).to(dtype))
        for i in range(2):
            inputs.append(make((24,), "cpu", torch.float32, seed=3 + i).to(dtype))
        keep = {"nothing": (0,), "modulation": (0, 1, 2), "affine": (0, 3, 4), "everything": range(5)}[given]
        leaves = [t.requires_grad_() if i in keep else None for i, t in enumerate(inputs)]
        (function(*leaves, 1e-6) * make((3, 70, 24), "cpu", torch.float32, seed=9).to(dtype)).sum().backward()
        return [t.grad for t in leaves if t is not None]

    exact = gradients(diffkern.layer_norm_modulate.reference, torch.float64)
    theirs = gradients(diffkern.layer_norm_modulate.reference, dtype)
    for ours, reference, e in zip(gradients(diffkern.layer_norm_modulate, dtype), theirs, exact, strict=True):
        assert ours.dtype == dtype
        # Sums over samples are rounded to bfloat16 once more than the reference's: one unit in the last place.
        allowed = 2 * (reference.double() - e).abs().max() + ulp(e, dtype)
        assert ((ours.double() - e).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_gradient_of_gate_residual_norm_modulate_is_the_references(dtype):
    shapes = [(3, 70, 24)] * 2 + [(3, 24)] * 3 + [(24,)] * 2

    def gradients(function, dtype):
        inputs = [make(s, "cpu", torch.bfloat16, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]
        r, normal = function(*inputs, 1e-6)
        for_r, for_normal = (make(shapes[0], "cpu", torch.bfloat16, seed=s).to(dtype) for s in (8, 9))
        ((r * for_r).sum() + (normal * for_normal).sum()).backward()
        return [t.grad for t in inputs]

    op = diffkern.gate_residual_norm_modulate
    exact, theirs = gradients(op.reference, torch.float64), gradients(op.reference, dtype)
    for ours, reference, e in zip(gradients(op, dtype), theirs, exact, strict=True):
        allowed = 2 * (reference.double() - e).abs().max() + ulp(e, dtype)
        assert ((ours.double() - e).abs() <= allowed).all()


def test_the_gradient_of_a_small_spread_keeps_its_digits():
    keys = diffkern.noise_keys(0, 2)
    mean = torch.full((2, 50), 100.0)
    logvar = torch.full((2, 50), -20.0, requires_grad=True)
    diffkern.reparameterize(mean, logvar, keys, 7).sum().backward()
    expected = torch.exp(torch.tensor(-10.0)) * diffkern.randn(keys, [50], 7) / 2
    torch.testing.assert_close(logvar.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sample", [s for s in OPS["group_norm_silu"].make_samples("cpu", torch.float64)
                                    if not s.workload], ids=lambda s: s.name)  # fmt: skip
def test_the_gradient_of_group_norm_silu_is_the_references(sample):
    """In float64, where both are exact to many digits: every argument, every combination of them."""
    args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in sample.args()]
    inputs = [a for a in args[:-2] if isinstance(a, torch.Tensor)]  # moments are those of x, and have none
    y = diffkern.group_norm_silu(*args)
    grad = make(tuple(y.shape), "cpu", torch.float64, seed=9)
    ours = torch.autograd.grad(y, inputs, grad)
    theirs = torch.autograd.grad(diffkern.group_norm_silu.reference(*args), inputs, grad)
    for g, e in zip(ours, theirs, strict=True):
        # "far from zero" loses the digits of 200^2 / spread^2
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_gradient_of_group_norm_silu(dtype):
    """Through the kernels: what autograd hands out is cut and cast as the arguments are."""
    sample = next(
        s for s in OPS["group_norm_silu"].make_samples("cpu", dtype) if s.name == "all at once, channels_last"
    )
    args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in sample.args()]
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    y = diffkern.group_norm_silu(*args)
    grad = make(tuple(y.shape), "cpu", dtype, "channels_last", seed=9)
    wide = [a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    exact = torch.autograd.grad(
        diffkern.group_norm_silu.reference(*wide), [a for a in wide if isinstance(a, torch.Tensor)], grad.double()
    )
    for g, e, a in zip(torch.autograd.grad(y, inputs, grad), exact, inputs, strict=True):
        assert g.dtype is dtype
        assert g.shape == a.shape
        # sums of up to 288 products: a rounding of the result, and of float32 sums
        assert ((g.double() - e).abs() <= ulp(e, dtype) + 2e-6 * e.abs().max()).all()


def test_training_through_a_compiled_op():
    x = make((2, 8, 4, 4), "cpu", torch.float32).requires_grad_()
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, w, b: diffkern.group_norm_silu(x, 4, w, b), fullgraph=True, backend="aot_eager")
    compiled(x, weight, bias).square().sum().backward()
    got = (x.grad, weight.grad, bias.grad)
    x.grad = weight.grad = bias.grad = None
    diffkern.group_norm_silu(x, 4, weight, bias).square().sum().backward()
    for g, e in zip(got, (x.grad, weight.grad, bias.grad), strict=True):
        torch.testing.assert_close(g, e)

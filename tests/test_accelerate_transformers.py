"""What `accelerate` replaces in SD 3, FLUX, Wan and LTX-Video, and that it computes what it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import diffkern

diffusers = pytest.importorskip("diffusers")
normalization = pytest.importorskip("diffusers.models.normalization")

from diffusers_models import MODELS, delta, make, randn, run  # noqa: E402 (after the check for diffusers)
from transformer_models import COUNTS, both, called_as_they_are  # noqa: E402


@pytest.mark.parametrize("name", COUNTS)
def test_blocks_are_replaced_and_run_in_ops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    report = diffkern.accelerate(model)
    counts = {entry.name: entry.count for entry in report.replaced}
    assert COUNTS[name].items() <= counts.items()
    seen = called_as_they_are(model, set(COUNTS[name]), monkeypatch)
    run(model, name)
    assert seen == []


@pytest.mark.parametrize("name", COUNTS)
def test_strict_leaves_nothing_that_was_expected(name: str) -> None:
    model = make(name)
    if name == "Wan":
        with pytest.raises(ValueError, match=r"would leave 1 Conv3d \(there is no op for it\)$"):
            diffkern.accelerate(model, strict=True)
    else:
        assert diffkern.accelerate(model, strict=True).missed == ()


def test_attention_of_wan_to_a_picture_is_said() -> None:
    report = diffkern.accelerate(make("Wan from a picture"))
    left = {(entry.name, entry.count, entry.reason) for entry in report.missed}
    assert ("WanAttention", 2, "it attends to a picture as well") in left
    assert {entry.name: entry.count for entry in report.replaced}["WanAttention"] == 2


def test_gradients_are_those_of_plain() -> None:
    args, kwargs = MODELS["Flux"][2]()
    grads = []
    for m in both("Flux"):
        m(*args, **kwargs).sample.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert delta(grads[1], grads[0]) <= 1e-4  # the timestep needs none, and is embedded in an op


@pytest.mark.parametrize(("name", "tokens"), [("Wan", 24), ("LTX", 12)])
def test_a_timestep_for_each_token(name: str, tokens: int) -> None:
    args, kwargs = MODELS[name][2]()
    times = torch.arange(2 * tokens).view(2, tokens) * 10
    with torch.no_grad():
        want, got = (m(*args, **kwargs | {"timestep": times}, return_dict=False)[0] for m in both(name))
    assert delta(got, want) <= 1e-4


def test_wan_with_what_diffusers_keeps_in_float32() -> None:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` leaves it: norms, tables and the embedding of the timestep."""
    name = "Wan"
    exact, (args, kwargs) = run(make(name), name).float(), MODELS[name][2]()
    args, kwargs = (args[0].bfloat16(),), kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].bfloat16()}
    errors = []
    for ours in (False, True):
        model = make(name)
        kept = model._keep_in_fp32_modules
        for key, t in (*model.named_parameters(), *model.named_buffers()):
            if not any(part in key for part in kept):
                t.data = t.data.bfloat16()
        if ours:
            diffkern.accelerate(model)
        with torch.no_grad():
            out = model(*args, **kwargs, return_dict=False)[0]
        errors.append((out.float().flatten() - exact).square().mean().sqrt())
    assert 0 < errors[1] <= 1.1 * errors[0]


def test_float16_of_flux_is_clipped() -> None:
    prompt, image, temb = (randn(1, n, 32, seed=n).half() for n in (3, 4, 1))
    prompt[0, 0, 0] = 65504
    largest = []
    for ours in (False, True):
        block = make("Flux", torch.float16).transformer_blocks[0]
        block.norm1_context.linear.bias.data[-32:] = 5.0  # the gate of the last layer
        block.ff_context.net[2].bias.data[0] = 6e4
        if ours:
            diffkern.accelerate(block)
        with torch.no_grad():
            largest.append(float(block(image, prompt, temb[:, 0])[0].abs().max()))
    assert largest == [65504, 65504]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", ["AdaLayerNorm", "AdaLayerNormContinuous"])
def test_modulated_norms(name: str, affine: bool) -> None:
    torch.manual_seed(0)
    if name == "AdaLayerNorm":
        norm = normalization.AdaLayerNorm(24, output_dim=80, norm_elementwise_affine=affine, chunk_dim=1)
        call: dict[str, Any] = {"temb": randn(2, 24, seed=2)}
    else:
        norm = normalization.AdaLayerNormContinuous(40, 24, elementwise_affine=affine)
        call = {"conditioning_embedding": randn(2, 24, seed=2)}
    for parameter in norm.norm.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        want = norm(randn(2, 9, 40), **call)
        assert diffkern.accelerate(norm).replaced[0].name == name
        got = norm(randn(2, 9, 40), **call)
    assert 0 < delta(got, want) <= 1e-5


def test_modulated_norms_that_are_left() -> None:
    model = nn.ModuleList(
        [normalization.AdaLayerNorm(24, 10), normalization.AdaLayerNormContinuous(40, 24, norm_type="rms_norm")]
    )
    reasons = {entry.name: entry.reason for entry in diffkern.accelerate(model).left}
    assert reasons["AdaLayerNorm"] == "one scale and shift serve all samples"
    assert reasons["AdaLayerNormContinuous"] == "its norm is not a LayerNorm"

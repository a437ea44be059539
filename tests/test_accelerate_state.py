"""What a user does to an accelerated model works as on a plain one: to change, copy, save, hook and train it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern.integrations.modules.base import Accelerated

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")
resnet = pytest.importorskip("diffusers.models.resnet")

from diffusers_models import UNET, accelerated, delta, make, run  # noqa: E402 (after the check for diffusers)

NAME = "SD 1.5"


def test_state_dict_is_the_same_tensors() -> None:
    model = make(NAME)
    before = model.state_dict()
    diffkern.accelerate(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before)
    assert isinstance(model.conv_in, nn.Conv2d)
    assert isinstance(model.mid_block.resnets[0], resnet.ResnetBlock2D)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data"])
def test_changed_weights_show_in_the_next_call(change: str) -> None:
    plain, model = make(NAME), accelerated(NAME)
    run(model, NAME)  # packs the weights as they were
    for m in (plain, model):
        conv = m.mid_block.resnets[0].conv1
        layer = m.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        with torch.no_grad():
            if change == "in place":
                conv.weight.mul_(2)
                layer.weight.add_(0.1)
            elif change == "load_state_dict":
                m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()})
            else:
                conv.weight.data += 0.1
                layer.weight.data = layer.weight.data * 3
    assert delta(run(model, NAME), run(plain, NAME)) <= 1e-4


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_accelerated_and_their_own(how: str) -> None:
    model = accelerated(NAME)
    want = run(model, NAME)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(run(other, NAME), want)
    assert isinstance(other.conv_in, Accelerated)
    with torch.no_grad():
        other.mid_block.resnets[0].conv1.weight.zero_()
    assert torch.equal(run(model, NAME), want)
    assert delta(run(other, NAME), want) > 0.01
    diffkern.restore(other)
    assert isinstance(model.conv_in, Accelerated)


def test_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    model = accelerated(NAME)
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert not any(isinstance(m, Accelerated) for m in again.modules())
    assert torch.equal(run(again, NAME), run(make(NAME), NAME))


def test_to_another_dtype() -> None:
    model, exact = accelerated(NAME), run(make(NAME), NAME)
    half = run(model.to(torch.bfloat16), NAME, torch.bfloat16)
    assert 1e-4 < delta(half, exact) < 0.1
    plain = make(NAME).to(torch.bfloat16).float()  # the weights as they were rounded
    assert delta(run(model.float(), NAME), run(plain, NAME)) <= 1e-4


def test_dtype_is_that_of_diffusers() -> None:
    model = diffusers.UNet2DModel(**UNET)
    diffkern.accelerate(model)
    assert model.dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float16)
    assert model.conv_in.weight.dtype == torch.float8_e4m3fn
    assert model.dtype == torch.float16


def test_hooks_of_a_layer_are_called() -> None:
    plain, model = make(NAME), accelerated(NAME)
    seen: list[float] = []

    def look(layer: Any, args: Any, out: Tensor) -> Tensor:
        seen.append(float(out.std()))
        return 2 * out

    for m in (plain, model):
        block = m.mid_block.attentions[0].transformer_blocks[0]
        block.attn1.to_q.register_forward_hook(look)
        block.ff.net[0].proj.register_forward_pre_hook(lambda layer, args: (args[0] + 0.1,))
        m.mid_block.resnets[0].conv1.register_forward_hook(look)
    want = run(plain, NAME)
    assert len(seen) == 2
    assert delta(run(model, NAME), want) <= 1e-4
    assert seen[2:] == pytest.approx(seen[:2], rel=1e-4)


@pytest.mark.parametrize("order", ["hook first", "hook last"])
def test_forward_replaced_as_offload_hooks_do(order: str) -> None:
    """Weights that are away until a hook brings them: accelerate's sequential offload sets `forward` on the module."""
    model, want = make(NAME), run(make(NAME), NAME)

    def hook(layer: Any) -> None:
        weight, layer._old_forward = layer.weight.data, layer.forward

        def forward(*args: Any) -> Any:
            layer.weight.data = weight
            try:
                return layer._old_forward(*args)
            finally:
                layer.weight.data = torch.full_like(weight, torch.nan)

        layer.weight.data = torch.full_like(weight, torch.nan)
        layer.forward = forward

    def hook_all() -> None:
        for m in model.modules():
            if type(m).__name__ in ("Linear", "Conv2d"):
                hook(m)

    if order == "hook first":
        hook_all()
        report = diffkern.accelerate(model)
        assert {e.reason for e in report.missed} == {"another library has replaced its forward"}
    else:
        diffkern.accelerate(model)
        hook_all()
    assert delta(run(model, NAME), want) <= 1e-4
    diffkern.restore(model)
    assert torch.equal(run(model, NAME), want)


def test_gradients_are_those_of_plain() -> None:
    plain, model = make(NAME), accelerated(NAME)
    grads = []
    for m in (plain, model):
        m.train()
        m.enable_gradient_checkpointing()
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        out = m(x, torch.tensor([500, 20]), torch.ones(2, 7, 32)).sample
        out.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    for want, got in zip(*grads, strict=True):
        assert torch.equal(want, got)


def test_frozen_model_passes_gradients_to_its_input() -> None:
    model = accelerated(NAME).requires_grad_(False)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    model(x, torch.tensor([500, 20]), torch.ones(2, 7, 32)).sample.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_autocast_runs_as_plain() -> None:
    plain, model = make(NAME), accelerated(NAME)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model, NAME), run(plain, NAME))


def test_forward_mode_derivatives_are_those_of_plain() -> None:
    name = "VAE without attention"  # of which PyTorch has no forward derivative
    plain, model = make(name), accelerated(name)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    want, got = (
        torch.func.jvp(lambda z, m=m: m.decode(z, return_dict=False)[0], (z,), (torch.ones_like(z),))[1]
        for m in (plain, model)
    )
    assert torch.equal(got, want)
    assert want.abs().max() > 0


def test_processor_of_the_user_runs() -> None:
    class Doubled(processors.AttnProcessor2_0):  # type: ignore[name-defined,misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(*args, **kwargs)

    plain, model = make(NAME), accelerated(NAME)
    before = run(model, NAME)
    for m in (plain, model):
        m.set_attn_processor(Doubled())
    want = run(plain, NAME)
    assert delta(want, before) > 0.01
    assert delta(run(model, NAME), want) <= 1e-4
    model.set_attn_processor(processors.AttnProcessor2_0())
    assert torch.equal(run(model, NAME), before)


@pytest.mark.parametrize("processor", ["AttnProcessor", "SlicedAttnProcessor"])
def test_other_processors_of_diffusers(processor: str) -> None:
    cls = getattr(processors, processor)
    plain, model = make(NAME), accelerated(NAME)
    for m in (plain, model):
        m.set_attn_processor(cls(1) if processor.startswith("Sliced") else cls())
    assert delta(run(model, NAME), run(plain, NAME)) <= 1e-4


def test_fused_projections_of_diffusers() -> None:
    model, want = make(NAME), run(make(NAME), NAME)
    model.fuse_qkv_projections()
    diffkern.accelerate(model)
    assert delta(run(model, NAME), want) <= 1e-4
    model.unfuse_qkv_projections()
    assert delta(run(model, NAME), want) <= 1e-4
    plain = make(NAME)
    for m in (plain, model):  # the weights that were fused are stale now
        with torch.no_grad():
            m.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(3)
    assert delta(run(model, NAME), run(plain, NAME)) <= 1e-4


def test_compiled_after_accelerate_is_the_same() -> None:
    model = accelerated("DDPM")
    want = run(model, "DDPM")
    torch.compiler.reset()
    assert delta(run(torch.compile(model, fullgraph=True), "DDPM"), want) <= 1e-4


def test_offload_hooks_of_accelerate() -> None:
    """Its hooks on every layer, as for sequential offload, put on an accelerated model and taken off again."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, want = accelerated(NAME), run(make(NAME), NAME)
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu", offload=True))
    assert model.conv_in.weight.device.type == "meta"
    assert delta(run(model, NAME), want) <= 1e-4
    hooks.remove_hook_from_submodules(model)
    assert model.conv_in.weight.device.type == "cpu"
    assert delta(run(model, NAME), want) <= 1e-4
    diffkern.restore(model)
    assert torch.equal(run(model, NAME), want)

"""LoRA layers (Hu et al. 2021) by peft, before and after `accelerate`: loaded, scaled, switched off, merged and taken
out. What is plain around them stays in ops, and restoring leaves them where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkern
from diffkern.integrations.modules.base import Accelerated

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusers_models import PROMPT, delta, make, run  # noqa: E402 (after the check for diffusers)

NAME = "SD 1.5"
TARGETS = ["to_q", "to_v", "to_out.0", "proj", "conv1", "proj_in", "time_emb_proj"]


def add(model: Any) -> None:
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), adapter_name="a")


@pytest.mark.parametrize("order", ["adapter first", "adapter last"])
def test_adapter_through_its_life(order: str) -> None:
    plain, model = make(NAME), make(NAME)
    bare = run(plain, NAME)
    if order == "adapter first":
        add(model)
    report = diffkern.accelerate(model)
    run(model, NAME)  # packs the weights as they were
    if order == "adapter last":
        add(model)
    add(plain)
    assert {e.name: e.count for e in report.replaced}["BasicTransformerBlock"] == 4

    def same(change: str, *args: Any, differs: bool = True) -> None:
        for m in (plain, model):
            getattr(m, change)(*args)
        want = run(plain, NAME)
        assert (delta(want, bare) > 0.01) == differs
        assert delta(run(model, NAME), want) <= 1e-4

    same("set_adapters", "a", 1.0)
    same("set_adapters", "a", 0.3)
    same("disable_adapters", differs=False)
    same("enable_adapters")
    same("fuse_lora")
    same("unfuse_lora")
    same("delete_adapters", "a", differs=False)


def test_restore_keeps_the_adapter() -> None:
    plain, model = make(NAME), make(NAME)
    add(plain)
    diffkern.accelerate(model)
    add(model)
    run(model, NAME)
    diffkern.restore(model)
    assert not any(isinstance(m, Accelerated) for m in model.modules())
    assert torch.equal(run(model, NAME), run(plain, NAME))


def test_training_an_adapter_has_the_gradients_of_plain() -> None:
    grads = []
    for accelerate in (False, True):
        model = make(NAME)
        if accelerate:
            diffkern.accelerate(model)
        add(model)
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        model(x, torch.tensor([500, 20]), **PROMPT).sample.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, ours = grads
    assert plain.keys() == ours.keys()
    assert all("lora" in name for name in plain)
    assert len(plain) > 20
    for name, grad in plain.items():
        # What is frozen runs in ops, so that the numbers that reach an adapter are rounded otherwise.
        assert delta(ours[name], grad) <= 1e-4

"""Recorded calls of accelerated networks, and what makes of a network another: weights, adapters, hooks, modes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from accelerated_graphs import _on_cpu, agree, both, recorded, same  # noqa: F401 (a fixture)
from graphs import CPURecorder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffkern

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")

from diffusers_models import PROMPT, pixels  # noqa: E402 (after the check for diffusers)


def test_weights_that_change_in_place_show_in_the_same_graph() -> None:
    plain, model = both("DDPM")
    first = agree(plain, model, pixels(3), 5)
    for m in (plain, model):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(1.1)
    after = agree(plain, model, pixels(3), 5, times=2)
    assert not same(after, first)
    assert CPURecorder.last.records == 1


def move(model: Any) -> None:
    for p in model.parameters():
        p.data = 1.1 * p.data


def tell(model: Any) -> None:
    for processor in model.attn_processors.values():
        processor.scale = 2.0


CHANGES: dict[str, Any] = {
    "assigned": lambda m: m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}, assign=True),
    "data": move,
    "a module": lambda m: setattr(m, "conv_out", copy.deepcopy(m.conv_out)),
    "an attribute": lambda m: setattr(m.mid_block.resnets[0], "output_scale_factor", 2.0),
    "freeu": lambda m: m.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "a processor": lambda m: m.set_attn_processor(processors.AttnProcessor()),
    "told to its processors": tell,
    "a backend": lambda m: diffkern.accelerate(m.mid_block, backend="reference"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_is_another_is_recorded_anew(change: str) -> None:
    plain, model = both("SD 1.5")
    t = torch.tensor([500])
    first = agree(plain, model, pixels(), t, **PROMPT)
    for m in (plain, model):
        CHANGES[change](m)
    seen = CPURecorder.last
    after = agree(plain, model, pixels(), t, **PROMPT)
    assert CPURecorder.last is not seen
    assert CPURecorder.last.records == 1
    if change in ("assigned", "data", "an attribute", "freeu", "a backend"):
        assert not same(after, first)


def test_another_dtype() -> None:
    plain, model = both("DDPM")
    agree(plain, model, pixels(3), 5)
    for m in (plain, model):
        m.bfloat16()
    agree(plain, model, pixels(3).bfloat16(), 5)
    assert (recorded(model), CPURecorder.last.records) == (1, 1)


def test_an_adapter_through_its_life() -> None:
    peft = pytest.importorskip("peft")
    plain, model = both("SD 1.5")
    call: Any = (pixels(), torch.tensor([500]))
    bare = agree(plain, model, *call, **PROMPT)
    for m in (plain, model):
        torch.manual_seed(1)
        m.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False), "a")
    for change, arguments in (
        ("set_adapters", ("a", 1.0)), ("set_adapters", ("a", 0.3)), ("disable_adapters", ()), ("enable_adapters", ()),
        ("fuse_lora", ()), ("unfuse_lora", ()),
    ):  # fmt: skip
        for m in (plain, model):
            getattr(m, change)(*arguments)
        out = agree(plain, model, *call, **PROMPT)
        assert recorded(model) == 1, change
        assert same(out, bare) == (change == "disable_adapters"), change
    agree(plain, model, *call, **PROMPT, cross_attention_kwargs={"scale": 0.5})
    assert recorded(model) == 2


def test_what_runs_as_it_is() -> None:
    plain, model = both("DDPM", True)
    x = pixels(3)

    def call() -> bool:
        return same(model(x, 5), plain(x, 5))

    for _ in range(4):  # with gradients, as parameters want them
        assert call()
        model(x, 5).sample.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for block in (torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False)):
            with block:
                assert all(call() for _ in range(4))
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert all(call() for _ in range(4))
        handle.remove()
        got = [torch.func.vmap(lambda x, m=m: m(x[None], 5).sample)(x) for m in (model, plain) for _ in range(4)]
        assert all(torch.allclose(g, got[0], atol=1e-5) for g in got)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert all(call() for _ in range(4))
    frozen = x.clone().requires_grad_()
    model.requires_grad_(False)
    for _ in range(4):
        model(frozen, 5).sample.sum().backward()
    assert frozen.grad is not None
    assert recorded(model) == 0


def test_hooks_and_classes_of_the_user() -> None:
    class Doubled(processors.AttnProcessor2_0):  # type: ignore[name-defined,misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(*args, **kwargs)

    call: Any = (pixels(), torch.tensor([500]))
    plain, model = both("SD 1.5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m in (plain, model):
            handle = m.mid_block.resnets[0].register_forward_hook(lambda m, args, out: 2 * out)
        agree(plain, model, *call, **PROMPT)
        assert recorded(model) == 0
        handle.remove()
        plain.mid_block.resnets[0]._forward_hooks.clear()
        model.register_forward_hook(lambda m, args, out: out.sample)  # around the network it is not recorded
        plain.register_forward_hook(lambda m, args, out: out.sample)
        agree(plain, model, *call, **PROMPT)
        assert recorded(model) == 1
        for m in (plain, model):
            m.set_attn_processor(Doubled())
        agree(plain, model, *call, **PROMPT)
        assert recorded(model) == 0
        diffkern.accelerate(model, cuda_graph=True)
        agree(plain, model, *call, **PROMPT)
        assert recorded(model) == 1


def test_compiled_parts() -> None:
    plain, model = both("DDPM")
    model.mid_block.resnets[0].compile(backend="eager")
    assert "no graph: a part of it is compiled" in str(diffkern.accelerate(model))
    agree(plain, model, pixels(3), 5)
    assert recorded(model) == 0


def test_in_and_out_of_inference_mode() -> None:
    plain, model = both("DDPM")
    for inside in (False, True, False):
        with torch.inference_mode(inside):
            out = agree(plain, model, pixels(3), 5)
        assert out.sample.is_inference() == inside
    assert CPURecorder.last.records == 1


def test_offload_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    call: Any = (pixels(), torch.tensor([500]))
    plain, model = both("SD 1.5", True)
    hooks.add_hook_to_module(model, hooks.CpuOffload("cpu"))
    with pytest.warns(RuntimeWarning, match="UNet2DConditionModel runs without a graph: a UNet2DConditionModel of"):
        agree(plain, model, *call, **PROMPT)
    hooks.remove_hook_from_module(model)
    agree(plain, model, *call, **PROMPT)
    assert recorded(model) == 1

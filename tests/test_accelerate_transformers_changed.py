"""Hooks, processors, adapters and the like of a user work on an accelerated SD 3, FLUX, Wan or LTX-Video as on a plain
one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffkern

diffusers = pytest.importorskip("diffusers")
flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")

from diffusers_models import MODELS, delta, make, randn, run  # noqa: E402 (after the check for diffusers)
from transformer_models import COUNTS, both, called_as_they_are  # noqa: E402

HOOKED = {
    "SD 3.5": (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.norm_k", "transformer_blocks.1.attn.norm_added_q",
        "transformer_blocks.1.attn.add_v_proj", "transformer_blocks.0.attn.to_add_out", "transformer_blocks.1.attn2",
        "transformer_blocks.0.norm1.norm", "transformer_blocks.0.norm2", "transformer_blocks.1.ff_context.net.2",
        "norm_out.norm",
    ),
    "Flux": (
        "transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.norm_added_k", "transformer_blocks.0.attn",
        "transformer_blocks.0.norm2_context", "single_transformer_blocks.0.attn.norm_q",
        "single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.1.act_mlp",
        "single_transformer_blocks.1.proj_out", "single_transformer_blocks.0.norm.norm",
    ),
    "Wan": (
        "blocks.0.attn1.norm_q", "blocks.0.attn1.to_out.0", "blocks.0.attn2", "blocks.0.norm2", "blocks.1.norm3",
        "blocks.1.attn2.to_v", "blocks.1.ffn",
    ),
    "LTX": (
        "transformer_blocks.0.attn1.norm_q", "transformer_blocks.1.attn1", "transformer_blocks.0.attn2",
        "transformer_blocks.1.norm1", "transformer_blocks.1.attn2.to_out.0", "transformer_blocks.1.ff.net.2",
    ),
}  # fmt: skip


def mixed(t: Tensor) -> Tensor:
    """Something else, also once it is normalised."""
    return t + 4 * t.roll(1, -1)


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in HOOKED.items() for path in paths])
def test_hooks_are_called(name: str, path: str) -> None:
    plain, model = both(name)
    want, seen = run(plain, name), []

    def more(layer: Any, args: Any, out: Any) -> Any:
        seen.append(layer)
        return tuple(map(mixed, out)) if isinstance(out, tuple) else mixed(out)

    for m in (plain, model):
        m.get_submodule(path).register_forward_hook(more)
    changed = run(plain, name)
    assert delta(changed, want) > 1e-3
    assert delta(run(model, name), changed) <= 1e-4
    assert seen == [plain.get_submodule(path), model.get_submodule(path)]


@pytest.mark.parametrize("name", ["SD 3.5", "Flux", "Wan", "LTX"])
def test_processor_of_the_user_runs(name: str) -> None:
    plain, model = both(name)
    before, processors = run(model, name), dict(model.attn_processors)
    first = type(next(iter(processors.values())))

    class Mixed(first):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            return tuple(map(mixed, out)) if isinstance(out, tuple) else mixed(out)

    for m in (plain, model):
        m.set_attn_processor(Mixed())
    want = run(plain, name)
    assert delta(want, before) > 0.01
    assert delta(run(model, name), want) <= 1e-4
    report = diffkern.accelerate(model)
    assert "its processor is Mixed" in {entry.reason for entry in report.missed}
    model.set_attn_processor(processors)
    diffkern.accelerate(model)
    assert torch.equal(run(model, name), before)


@pytest.mark.parametrize("name", ["Flux", "Wan", "LTX"])
def test_attention_backend_of_the_user_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = both(name)
    attention = next(cls for cls in COUNTS[name] if cls.endswith("Attention"))
    seen = called_as_they_are(model, {attention}, monkeypatch)
    model.set_attention_backend("_native_math")
    assert delta(run(model, name), run(plain, name)) <= 1e-4
    assert len(seen) == 2 * COUNTS[name][attention]  # of both models
    reasons = {entry.reason for entry in diffkern.accelerate(model).missed}
    assert "its attention backend is _native_math" in reasons


@pytest.mark.parametrize("name", ["SD 3", "SD 3.5", "Flux", "Wan", "LTX"])
def test_fused_projections_of_diffusers(name: str) -> None:
    plain, model = both(name)
    if name == "SD 3.5":  # diffusers' processor takes no attention without a prompt
        for m in (plain, model):
            for block in m.transformer_blocks:
                block.attn2, block.use_dual_attention = None, False
                if type(block.norm1).__name__ == "SD35AdaLayerNormZeroX":
                    block.norm1.register_forward_hook(lambda norm, args, out: out[:5])
    before = run(plain, name)
    for m in (plain, model):
        m.fuse_qkv_projections()
    want = run(plain, name)
    # That processor leaves the norms of queries and keys out.
    assert (delta(want, before) > 0.01) == (name == "SD 3.5")
    assert delta(run(model, name), want) <= 1e-4
    for m in (plain, model):
        m.unfuse_qkv_projections()
        for attn in m.modules():
            if hasattr(attn, "to_q"):
                with torch.no_grad():
                    attn.to_q.weight.mul_(1.5)
    assert delta(run(model, name), run(plain, name)) <= 1e-4


def test_ip_adapter_of_flux() -> None:
    name = "Flux"
    plain, model = both(name)
    args, kwargs = MODELS[name][2]()
    given = {"joint_attention_kwargs": {"ip_hidden_states": [randn(2, 5, 8, seed=5)]}}
    outs = []
    with torch.no_grad():
        for m in (plain, model):
            torch.manual_seed(0)
            m.transformer_blocks[0].attn.set_processor(flux.FluxIPAdapterAttnProcessor(32, 8, num_tokens=[5]))
            outs.append(m(*args, **kwargs, **given, return_dict=False)[0])
    assert delta(outs[1], outs[0]) <= 1e-4
    assert delta(outs[0], run(make(name), name).view_as(outs[0])) > 0.01


def test_lora_layers_show() -> None:
    peft = pytest.importorskip("peft")
    name = "Flux"
    plain, model = both(name)
    before = run(plain, name)
    for m in (plain, model):
        torch.manual_seed(0)
        m.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q", "add_k_proj", "proj_mlp", "to_out.0"], init_lora_weights=False)
        )
    want = run(plain, name)
    assert delta(want, before) > 0.01
    assert delta(run(model, name), want) <= 1e-4


def test_chunked_feed_forward() -> None:
    plain, model = both("SD 3.5")
    for m in (plain, model):
        m.enable_forward_chunking(1)
    calls = []
    model.transformer_blocks[0].ff.register_forward_hook(lambda layer, args, out: calls.append(len(out)))
    assert delta(run(model, "SD 3.5"), run(plain, "SD 3.5")) <= 1e-4
    assert calls == [1, 1]

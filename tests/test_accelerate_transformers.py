"""What `accelerate` replaces in SD 3, FLUX, Wan and LTX-Video, and that changes by a user work as on plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffkern

diffusers = pytest.importorskip("diffusers")
normalization = pytest.importorskip("diffusers.models.normalization")
flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")

from diffusers_models import MODELS, make, randn, run  # noqa: E402 (after the check for diffusers)

# By model: how many of which classes run in ops, beside linear layers and the like.
COUNTS = {
    "SD 3": {"JointTransformerBlock": 3, "Attention": 3, "AdaLayerNormZero": 5, "AdaLayerNormContinuous": 2},
    "SD 3.5": {"JointTransformerBlock": 3, "Attention": 5, "SD35AdaLayerNormZeroX": 2, "RMSNorm": 16},
    "ControlNet of SD 3.5, without a prompt": {"SD3SingleTransformerBlock": 3, "Attention": 3},
    "Flux": {
        "FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2, "FluxAttention": 4, "AdaLayerNormZeroSingle": 2,
        "AdaLayerNormContinuous": 1, "FeedForward": 4,
    },
    "Wan": {"WanTransformerBlock": 2, "WanAttention": 4, "FeedForward": 2, "RMSNorm": 8},
    "LTX": {"LTXVideoTransformerBlock": 2, "LTXAttention": 4, "FeedForward": 2, "RMSNorm": 12},
    "PixArt": {"BasicTransformerBlock": 2, "Attention": 4, "FeedForward": 2},
    "DiT": {"BasicTransformerBlock": 2, "Attention": 2, "AdaLayerNormZero": 2, "FeedForward": 2},
}  # fmt: skip


def accelerated(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = make(name, dtype)
    diffkern.accelerate(model)
    return model


def delta(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.std())


def both(name: str) -> tuple[Any, Any]:
    return make(name), accelerated(name)


def called_as_they_are(model: Any, names: set[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the class of each accelerated module that is run by its own forward."""
    seen: list[str] = []
    for cls in {type(m).plain for m in model.modules() if type(m).__name__ in names}:

        def forward(self: Any, *args: Any, cls: Any = cls, own: Any = cls.forward, **kwargs: Any) -> Any:
            seen.append(cls.__name__)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    return seen


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


def test_gradients_are_those_of_plain() -> None:
    args, kwargs = MODELS["Flux"][2]()
    grads = []
    for m in both("Flux"):
        m(*args, **kwargs).sample.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters()]))
    assert delta(grads[1], grads[0]) <= 1e-4  # the timestep needs none, and is embedded in an op


def test_chunked_feed_forward() -> None:
    plain, model = both("SD 3.5")
    for m in (plain, model):
        m.enable_forward_chunking(1)
    calls = []
    model.transformer_blocks[0].ff.register_forward_hook(lambda layer, args, out: calls.append(len(out)))
    assert delta(run(model, "SD 3.5"), run(plain, "SD 3.5")) <= 1e-4
    assert calls == [1, 1]


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

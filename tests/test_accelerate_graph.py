"""Calls of accelerated networks that are recorded and replayed: all of it but the recording itself, which
tests/test_accelerate_graph_gpu.py does. What is compared are bits, with the same network without graphs."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from graphs import CPURecorder, recorded_by
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import diffkern
from diffkern.graphs import calls, kept

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")

from diffusers_models import MODELS, PROMPT, accelerated, make, pixels  # noqa: E402 (after the check for diffusers)
from test_accelerate_pipelines import controlnet, picture  # noqa: E402

NAMES = ["DDPM", "SDXL", "ControlNet", "DiT", "PixArt", "SD 3.5", "Flux with guidance", "Wan", "LTX"]
BEFORE = calls.BEFORE["auto"]


@pytest.fixture(name="on_cpu", autouse=True)
def _on_cpu():
    with recorded_by(CPURecorder) as patch:
        CPURecorder.last = CPURecorder(torch.device("cpu"))
        yield patch


def both(name: str, cuda_graph: Any = "auto") -> tuple[Any, Any]:
    """Without graphs and with."""
    models = make(name), make(name)
    for model, option in zip(models, (False, cuda_graph), strict=True):
        diffkern.accelerate(model, cuda_graph=option)
    return models


def tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def same(a: Any, b: Any) -> bool:
    """Whether two results are of one kind, layout and value."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return type(a) is type(b) and all(x.stride() == y.stride() and torch.equal(x, y) for x, y in pairs)


@torch.no_grad()
def agree(plain: Any, model: Any, *args: Any, times: int = BEFORE + 1, **kwargs: Any) -> Any:
    """Call both alike, often enough to record; their results are the same. Returns the last."""
    want = plain(*args, **kwargs)
    for _ in range(times):
        got = model(*args, **kwargs)
        assert same(got, want)
    return got


def recorded(model: Any) -> int:
    """How many graphs a network has."""
    found = vars(model).get(calls.NAME)
    return 0 if found is None else sum(graph is not None for graph in found.graphs.kept.values())


def replays(model: Any) -> int:
    return vars(model)[calls.NAME].graphs.recorder.replays


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_calls_with_other_numbers(name: str) -> None:
    """Each call has other numbers in all its tensors, and the results of all are right in the end."""
    plain, model = both(name)
    args, kwargs = MODELS[name][2]()
    found = []
    for i in range(BEFORE + 3):
        call_args, call_kwargs = tree_map(lambda t, i=i: _moved(t, i), (args, kwargs))
        found.append((model(*call_args, **call_kwargs), plain(*call_args, **call_kwargs)))
    assert all(same(got, want) for got, want in found)
    assert not any(same(found[0][0], other) for other, _ in found[1:])
    assert (CPURecorder.last.records, CPURecorder.last.replays) == (1, 3)
    # As a tuple is another call.
    got = agree(plain, model, *args, **kwargs, return_dict=False)
    assert type(got) is tuple
    assert CPURecorder.last.records == 2


def _moved(value: Any, i: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value + 0.01 * i if value.is_floating_point() else value if value.max() <= 1 else (value + i) % 900


@pytest.mark.parametrize("name", ["VAE", "tiny VAE"])
@torch.no_grad()
def test_encode_and_decode(name: str) -> None:
    plain, model = both(name)
    for i in range(BEFORE + 2):
        image, latents = pixels(3, 32) + 0.1 * i, pixels(4, 8) - 0.1 * i
        if name == "VAE":
            got, want = (m.encode(image).latent_dist.parameters for m in (model, plain))
        else:
            got, want = (m.encode(image).latents for m in (model, plain))
        assert torch.equal(got, want)
        assert same(model.decode(latents), plain.decode(latents))
    assert [recorded(m) for m in (model, model.encoder, model.decoder)] == [0, 1, 1]


@torch.no_grad()
def test_residuals_of_a_controlnet() -> None:
    controls, unets = both("ControlNet"), both("SD 1.5")
    results: list[Any] = [[], []]
    for i in range(BEFORE + 2):
        x, t, image = pixels() + 0.1 * i, torch.tensor(500 - i), pixels(3, 32) - 0.1 * i
        for control, unet, found in zip(controls, unets, results, strict=True):
            down, mid = control(x, t, **PROMPT, controlnet_cond=image, conditioning_scale=0.5, return_dict=False)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            found.append((down, mid, unet(x, t, **PROMPT, **more)))
    for want, got in zip(*results, strict=True):
        assert all(map(same, got, want))
    assert (recorded(controls[1]), recorded(unets[1])) == (1, 1)


@pytest.mark.parametrize("name", ["DDPM", "SD 1.5"])
@torch.no_grad()
def test_a_timestep_that_is_a_number(name: str) -> None:
    plain, model = both(name)
    kwargs = PROMPT if name == "SD 1.5" else {}
    x = pixels(3 if name == "DDPM" else 4)
    kinds: list[Any] = [int, lambda i: i + 0.5, lambda i: torch.tensor(i), lambda i: torch.tensor(i / 3)]
    for kind in kinds:
        for i in range(10, 12 + BEFORE):
            assert same(model(x, kind(i), **kwargs), plain(x, kind(i), **kwargs))
    # One that is a number is told apart by its dtype alone, and a UNet2DModel makes whole numbers of all.
    assert recorded(model) == (2 if name == "DDPM" else 3)
    agree(plain, model, x, timestep=11, **kwargs)
    assert recorded(model) == (3 if name == "DDPM" else 4)


def test_a_pipeline() -> None:
    (plain, call), (pipe, _) = controlnet(), controlnet()
    for each, option in ((plain, False), (pipe, "auto")):
        each.scheduler = diffusers.DDIMScheduler()
        diffkern.accelerate(each, cuda_graph=option)
    call = {**call, "num_inference_steps": 4}
    changed = {**call, "prompt_embeds": 0.5 * call["prompt_embeds"]}
    for arguments, replayed in ((call, 1), (changed, 5), ({**call, "num_images_per_prompt": 2}, 6)):
        assert np.array_equal(picture(pipe, arguments), picture(plain, arguments))
        assert (replays(pipe.unet), replays(pipe.controlnet)) == (replayed, replayed)
    assert (recorded(pipe.unet), recorded(pipe.controlnet)) == (2, 2)


def test_a_changed_batch_is_another_graph_and_few_are_kept(on_cpu) -> None:
    on_cpu.setattr(calls, "LIMIT", 3)
    on_cpu.setattr(kept, "LIMIT", 3)
    on_cpu.setattr(calls, "BEFORE_FULL", 5)
    plain, model = both("DDPM")
    for n in (1, 2, 3, 4):
        agree(plain, model, torch.ones(n, 3, 16, 16), 7)
    assert (recorded(model), CPURecorder.last.records) == (3, 3)
    agree(plain, model, torch.ones(4, 3, 16, 16), 7, times=3)  # now it came often enough to take another's place
    assert (recorded(model), CPURecorder.last.records) == (3, 4)
    agree(plain, model, torch.ones(2, 3, 16, 16), 7, times=1)
    assert CPURecorder.last.records == 4


def test_what_tells_calls_apart() -> None:
    plain, model = both("DDPM")
    x, t = pixels(3), torch.tensor([500])
    agree(plain, model, x, t.expand(2))  # two entries in one place
    agree(plain, model, x.to(memory_format=torch.channels_last), t.expand(2))
    agree(plain, model, x, t.float())
    agree(plain, model, x[:1].expand(2, -1, -1, -1), timestep=t)
    assert recorded(model) == 4
    with diffkern.use_backend("reference"):
        agree(plain, model, x, t.expand(2))
    with diffkern.batch_invariant():
        agree(plain, model, x, t.expand(2))
    assert recorded(model) == 6


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
    assert "no CUDA graph: a part of it is compiled" in str(diffkern.accelerate(model))
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
    with pytest.warns(
        RuntimeWarning, match="UNet2DConditionModel runs without a CUDA graph: a UNet2DConditionModel of"
    ):
        agree(plain, model, *call, **PROMPT)
    hooks.remove_hook_from_module(model)
    agree(plain, model, *call, **PROMPT)
    assert recorded(model) == 1


class _Unrecordable(processors.AttnProcessor2_0):  # type: ignore[name-defined,misc]
    """Does in its call what a recording does not stand."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def __call__(self, attn: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.what == "asks":
            x = x * (1 + float(x.mean()))
        elif self.what == "draws":
            x = x + 0.0 * torch.rand_like(x)
        elif torch._C._len_torch_dispatch_stack():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(attn, x, *args, **kwargs)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("asks", "the model asks the device for a number"),
        ("draws", "the model draws random numbers"),
        ("memory", "there is not enough memory for it$"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is_after_one_warning(what: str, reason: str) -> None:
    plain, model = both("SD 1.5", True)
    for m in (plain, model):
        m.set_attn_processor(_Unrecordable(what))
    with pytest.warns(RuntimeWarning, match=f"^UNet2DConditionModel runs without a CUDA graph: {reason}") as caught:
        agree(plain, model, pixels(), torch.tensor([500]), **PROMPT, times=6)
    assert len(caught) == 1
    assert caught[0].filename.endswith("test_accelerate_graph.py")
    assert recorded(model) == 0


def test_what_changes_in_every_call_is_seldom_looked_at(on_cpu) -> None:
    class Counting(processors.AttnProcessor2_0):  # type: ignore[name-defined,misc]
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            return super().__call__(*args, **kwargs)

    looks = []

    class Counted(calls.State):
        def __init__(self, network: nn.Module) -> None:
            looks.append(network)
            super().__init__(network)

    on_cpu.setattr(calls, "State", Counted)
    plain, model = both("SD 1.5", True)
    for m in (plain, model):
        m.set_attn_processor(Counting())
    agree(plain, model, pixels(), torch.tensor([500]), **PROMPT, times=20)
    assert recorded(model) == 0
    assert len(looks) == 4  # thrice, then after 8 calls, then after 16
    for m in (plain, model):
        m.set_attn_processor(processors.AttnProcessor2_0())
    agree(plain, model, pixels(), torch.tensor([500]), **PROMPT, times=8 + 32 + 4)
    assert recorded(model) == 1


def test_dropout_in_training_is_not_recorded() -> None:
    _, model = both("padding of the DDPM weights, an odd size")
    args, _ = MODELS["padding of the DDPM weights, an odd size"][2]()
    model.train()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="draws random numbers") as caught:
        out = [model(*args).sample for _ in range(6)]
    assert len(caught) == 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(out))


def test_arguments_of_which_nothing_is_known() -> None:
    plain, model = both("SD 1.5", True)
    call: Any = (pixels(), torch.tensor([500]))
    with pytest.warns(RuntimeWarning, match="it is given a object") as caught:
        agree(plain, model, *call, **PROMPT, cross_attention_kwargs={"scale": 1.0, "other": object()})
    assert len([w for w in caught if "CUDA graph" in str(w.message)]) == 1
    assert recorded(model) == 0


def test_copies_have_graphs_of_their_own_and_saved_ones_none(tmp_path) -> None:
    plain, model = both("DDPM")
    agree(plain, model, pixels(3), 5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), copy.copy(model), torch.load(file, weights_only=False)):
        assert calls.NAME not in vars(other)
        agree(plain, other, pixels(3), 5)
        assert recorded(other) == 1
    with torch.no_grad():
        other.conv_in.weight.zero_()
    agree(plain, model, pixels(3), 5, times=1)
    model.save_pretrained(tmp_path)
    assert type(diffusers.UNet2DModel.from_pretrained(tmp_path)) is diffusers.UNet2DModel


@pytest.mark.parametrize("how", ["restore", "False", "the model", "another device"])
def test_graphs_are_freed(how: str, on_cpu) -> None:
    plain, model = both("DDPM")
    agree(plain, model, pixels(3), 5)
    (graph,) = vars(model)[calls.NAME].graphs.kept.values()
    buffer = weakref.ref(graph.given[0])
    del graph
    if how == "restore":
        diffkern.restore(model)
        assert type(model) is diffusers.UNet2DModel
    elif how == "False":
        diffkern.accelerate(model, cuda_graph=False)
        assert type(model) is diffusers.UNet2DModel
    elif how == "the model":
        del model
    else:
        on_cpu.undo()
        agree(plain, model, pixels(3), 5, times=1)
    gc.collect()
    assert buffer() is None


def test_weights_that_were_replaced_are_not_held() -> None:
    plain, model = both("DDPM")
    agree(plain, model, pixels(3), 5)
    gone = weakref.ref(model.conv_in.weight)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    gc.collect()
    assert gone() is None


def test_report() -> None:
    model = make("SD 1.5")
    auto = diffkern.accelerate(model)
    assert auto.as_dict()["graphs"] == [
        {"name": "UNet2DConditionModel", "count": 1, "how": "a CUDA graph of a call, after 3 like it"}
    ]
    assert str(auto).splitlines()[-1].split("  ")[-1] == "a CUDA graph of a call, after 3 like it"
    assert diffkern.accelerate(model, cuda_graph=True).graphs[0].how.endswith("after 2 like it")
    assert diffkern.accelerate(model, cuda_graph=False).graphs == ()
    model.mid_block.resnets[0].register_forward_pre_hook(lambda *_: None)
    how = "no CUDA graph: a ResnetBlock2D of it has a hook, or a forward of its own"
    assert diffkern.accelerate(model).graphs[0].how == how


def test_report_where_there_are_no_graphs(on_cpu) -> None:
    on_cpu.undo()
    model = make("VAE")
    assert diffkern.accelerate(model).graphs == ()
    asked = diffkern.accelerate(model, cuda_graph=True).graphs
    assert {(e.name, e.how) for e in asked} == {
        (name, "no CUDA graph: it is on the cpu, which has none") for name in ("Encoder", "Decoder")
    }
    with pytest.raises(ValueError, match="cuda_graph must be True, False or 'auto', not 'always'"):
        diffkern.accelerate(model, cuda_graph="always")


def test_signature_is_that_of_the_network() -> None:
    """Pipelines ask a network what it takes, after others were accelerated too."""
    import inspect

    accelerated("VAE")
    model = accelerated("SD 1.5")
    accelerated("DiT")
    assert "added_cond_kwargs" in inspect.signature(model.forward).parameters

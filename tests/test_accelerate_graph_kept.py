"""What accelerated networks record and keep: what cannot be recorded, copies, memory, and what is reported."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref
from typing import Any

import pytest
import torch
from accelerated_graphs import _on_cpu, agree, both, recorded  # noqa: F401 (a fixture)
from graphs import CPURecorder
from torch import Tensor, nn

import diffkern
from diffkern.graphs import calls, kept

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")

from diffusers_models import MODELS, PROMPT, accelerated, make, pixels  # noqa: E402 (after the check for diffusers)


class _Unrecordable(processors.AttnProcessor2_0):  # type: ignore[name-defined,misc]
    """Does in its call what a recording does not stand."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def __call__(self, attn: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.what == "asks":
            x = x * (1 + float(x.mean()))
        elif torch._C._len_torch_dispatch_stack():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(attn, x, *args, **kwargs)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("asks", "the model asks the device for a number"),
        ("memory", "there is not enough memory for it$"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is_after_one_warning(what: str, reason: str) -> None:
    plain, model = both("SD 1.5", True)
    for m in (plain, model):
        m.set_attn_processor(_Unrecordable(what))
    with pytest.warns(RuntimeWarning, match=f"^UNet2DConditionModel runs without a graph: {reason}") as caught:
        agree(plain, model, pixels(), torch.tensor([500]), **PROMPT, times=12)
    assert len(caught) == 1
    assert CPURecorder.last.records == 1  # not tried again and again
    assert caught[0].filename.endswith("accelerated_graphs.py")
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


def test_dropout_in_training_draws_anew() -> None:
    plain, model = both("padding of the DDPM weights, an odd size")
    args, _ = MODELS["padding of the DDPM weights, an odd size"][2]()
    found = []
    for m in (plain, model):
        m.train()
        torch.manual_seed(3)
        with torch.no_grad():
            found.append([m(*args).sample for _ in range(6)])
    assert recorded(model) == 1
    assert all(map(torch.equal, *found))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(found[1]))


def test_arguments_of_which_nothing_is_known() -> None:
    plain, model = both("SD 1.5", True)
    call: Any = (pixels(), torch.tensor([500]))
    with pytest.warns(RuntimeWarning, match="it is given a object") as caught:
        agree(plain, model, *call, **PROMPT, cross_attention_kwargs={"scale": 1.0, "other": object()})
    assert len([w for w in caught if "without a graph" in str(w.message)]) == 1
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
    buffer = weakref.ref(graph.replay)
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
        on_cpu.setattr(kept, "has_graphs", lambda device: False)
        agree(plain, model, pixels(3), 5, times=1)
    gc.collect()
    assert buffer() is None


def test_a_network_goes_with_its_last_reference() -> None:
    """And does not wait, with its weights, for the garbage collector."""
    plain, model = both("DDPM")
    agree(plain, model, pixels(3), 5)
    gone = weakref.ref(model.conv_in.weight)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


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
        {"name": "UNet2DConditionModel", "count": 1, "how": "the kernels of a call recorded, after 3 like it"}
    ]
    assert str(auto).splitlines()[-1].split("  ")[-1] == "the kernels of a call recorded, after 3 like it"
    assert diffkern.accelerate(model, cuda_graph=True).graphs[0].how.endswith("after 2 like it")
    assert diffkern.accelerate(model, cuda_graph=False).graphs == ()
    model.mid_block.resnets[0].register_forward_pre_hook(lambda *_: None)
    how = "no graph: a ResnetBlock2D of it has a hook, or a forward of its own"
    assert diffkern.accelerate(model).graphs[0].how == how


def test_report_where_there_are_no_graphs(on_cpu) -> None:
    on_cpu.delitem(kept.RECORDERS, "cpu")
    model = make("VAE")
    assert diffkern.accelerate(model).graphs == ()
    asked = diffkern.accelerate(model, cuda_graph=True).graphs
    assert {(e.name, e.how) for e in asked} == {
        (name, "no graph: it is on the cpu, which has none") for name in ("Encoder", "Decoder")
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

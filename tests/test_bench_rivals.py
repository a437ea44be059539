"""The rivals of ops: found by their files, said to be missing, called with their arguments in the right places, and
refused when they are wrong. Those that need a GPU are called with stand-ins that compute with PyTorch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffkern.bench import plain
from diffkern.bench.compare import compare
from diffkern.bench.rivals import Rival, judge, judged, left_out, rivals
from diffkern.cli import main
from diffkern.op import OPS
from diffkern.testing import tensors

GPU = ("apex", "flash_attn", "library", "liger_kernel", "xformers")


def args_of(name: str, sample: str, dtype: torch.dtype = torch.float32, **changed: Any) -> tuple[Any, ...]:
    op = OPS[name]
    args = list(op.bind(*next(s for s in op.make_samples("cpu", dtype) if s.name == sample).args()))
    for argument, value in changed.items():
        args[op.positions[argument]] = value
    return tuple(args)


def test_a_rival_is_a_file():
    files = {path.stem for path in Path(str(plain.__file__)).with_name("rivals").glob("*.py")} - {"__init__"}
    assert set(rivals()) == files
    assert list(rivals())[:2] == ["eager", "compile"]
    assert all(isinstance(rival, Rival) for rival in rivals().values())


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = left_out(rivals(), "cpu")
    assert {name: found.pop(name) for name in GPU} == dict.fromkeys(GPU, "runs on cuda only")
    assert found["openvino"] == "openvino is not installed (pip install openvino)"
    assert "eager" not in found
    found = left_out(rivals(), "cuda")
    assert found["apex"] == "group_norm_cuda is not installed (build apex with its --group_norm)"
    assert found["onnxruntime"] == "runs on cpu only"
    assert "library" not in found


@pytest.fixture(name="fake")
def make_fake(monkeypatch):
    """Puts a module into sys.modules, with all that it lies in."""

    def fake(name: str, **functions: Any) -> None:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:i]))
            module.__spec__ = ModuleSpec(module.__name__, None)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for key, function in functions.items():
            setattr(sys.modules[name], key, function)

    return fake


def runs(rival: str, op: str, args: tuple[Any, ...]) -> bool:
    """Whether a rival has something for a call. If so, it runs and is right."""
    binds = rivals()[rival].ops(OPS[op], args, "cuda")
    for bind in binds.values():
        judged(OPS[op], bind)(*args)()
    return bool(binds)


def sdpa(q, k, v, bias=None, scale=None):
    """Of [B, S, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2)


def test_xformers_is_called_right(fake):
    def attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert p == 0
        assert attn_bias is None or attn_bias.shape == (*query.shape[:1], query.shape[2], query.shape[1], key.shape[1])
        return sdpa(query, key, value, attn_bias, scale)

    fake("xformers.ops", memory_efficient_attention=attention)
    assert runs("xformers", "attention", args_of("attention", "odd"))
    assert runs("xformers", "attention", args_of("attention", "masked, added"))
    assert not runs("xformers", "attention", args_of("attention", "masked, padding"))  # a bool mask
    assert not runs("xformers", "linear", args_of("linear", "plain"))


def test_flash_attn_is_called_right(fake):
    def attention(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert dropout_p == 0
        assert not causal
        return sdpa(q, k, v, None, softmax_scale)

    fake("flash_attn", flash_attn_func=attention)
    assert runs("flash_attn", "attention", args_of("attention", "odd", torch.bfloat16))
    assert not runs("flash_attn", "attention", args_of("attention", "odd"))  # float32
    assert not runs("flash_attn", "attention", args_of("attention", "512 a head", torch.bfloat16))
    assert not runs("flash_attn", "attention", args_of("attention", "masked, added", torch.bfloat16))


class GroupNorm(torch.nn.GroupNorm):
    """apex's, of which the channels_last pictures are asked for here."""

    SUPPORTED_GROUPS = frozenset([16, 32])
    SUPPORTED_CHANNELS = frozenset([64, 128])

    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=""):
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.act = act

    def forward(self, x):
        assert x.is_contiguous(memory_format=torch.channels_last)
        return F.silu(super().forward(x)) if self.act == "silu" else super().forward(x)


def test_apex_is_called_right(fake):
    fake("apex.contrib.group_norm", GroupNorm=GroupNorm)
    sample = "emoji UNet 16x16, channels_last"
    few: dict[str, Any] = {"x": torch.randn(2, 64, 4, 4).contiguous(memory_format=torch.channels_last)}
    for silu in (True, False):
        assert runs("apex", "group_norm_silu", args_of("group_norm_silu", sample, silu=silu, **few))
    with pytest.raises(RuntimeError, match="has no kernel for 8 groups of 64 channels"):
        runs("apex", "group_norm_silu", args_of("group_norm_silu", sample, num_groups=8, **few))
    assert not runs("apex", "group_norm_silu", args_of("group_norm_silu", sample, x=torch.randn(2, 64, 4, 4)))
    assert not runs("apex", "group_norm_silu", args_of("group_norm_silu", "a skip inside a group, channels_last"))


def test_liger_is_called_right(fake):
    def rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        return F.rms_norm(X, X.shape[-1:], W, eps)

    fake(
        "liger_kernel.transformers.functional",
        liger_rms_norm=rms_norm,
        liger_layer_norm=lambda X, W, B, eps: F.layer_norm(X, X.shape[-1:], W, B, eps),
        liger_geglu=lambda a, b: F.gelu(a, approximate="tanh") * b,
        liger_swiglu=lambda a, b: F.silu(a) * b,
    )
    assert runs("liger_kernel", "rms_norm", args_of("rms_norm", "odd"))
    assert runs("liger_kernel", "layer_norm_modulate", args_of("layer_norm_modulate", "odd, affine"))
    assert not runs("liger_kernel", "layer_norm_modulate", args_of("layer_norm_modulate", "odd"))
    bare = {"residual": None, "gate": None}
    for activation in ("geglu", "swiglu"):
        args = args_of("linear", "gated, of whole tiles", torch.bfloat16, activation=activation, **bare)
        assert runs("liger_kernel", "linear", args)
    assert not runs("liger_kernel", "linear", args_of("linear", "plain"))


@pytest.mark.parametrize(
    ("library", "name", "sample"),
    [("onnxruntime", "attention", "odd"), ("openvino", "group_norm_silu", "all at once, channels_last")],
)
@torch.no_grad()
def test_what_converts_networks_computes_an_op(library, name, sample):
    pytest.importorskip(library)
    pytest.importorskip("onnxscript" if library == "onnxruntime" else library)
    assert runs(library, name, args_of(name, sample))
    assert not runs(library, "randn", args_of("randn", "odd"))  # its noise could not be checked
    bfloat16 = args_of(name, sample, torch.bfloat16)
    if library == "openvino":
        assert runs(library, name, bfloat16)
    else:
        with pytest.raises(RuntimeError, match="has no bfloat16 on a CPU"):
            runs(library, name, bfloat16)


def test_the_narrowest_dtype_says_what_an_error_may_be():
    op = OPS["sampler_step"]
    for dtype, right in ((torch.bfloat16, True), (torch.float32, False)):  # of the model: the state is float32
        args = args_of("sampler_step", "bare", dtype)
        result = [1.01 * t for t in tensors(op.reference(*args))]
        with contextlib.nullcontext() if right else pytest.raises(ValueError, match="wrong by"):
            judge(op, args, result)


def test_a_wrong_rival_is_refused_and_the_record_says_so(monkeypatch, tmp_path, capsys):
    def raises(*args):
        raise KeyError("of\nthe library")

    wrong = {
        "scaled": lambda *args: lambda: 1.01 * OPS["rms_norm"].reference(*args),
        "cut": lambda *args: lambda: OPS["rms_norm"].reference(*args)[..., 1:],
        "two": lambda *args: lambda: (args[0], args[0]),
        "raises": raises,
        "right": lambda *args: lambda: (1 + 1e-5) * OPS["rms_norm"].reference(*args),
    }
    monkeypatch.setitem(rivals(), "other", Rival(ops=lambda op, args, device: wrong))
    monkeypatch.setitem(rivals(), "absent", Rival(why_not=lambda device: "is not here"))
    command = ["bench", "ops", "--op", "rms_norm", "--tiny", "--rounds", "2", "--dtype", "float32", "--device", "cpu"]
    assert main([*command, "--rivals", "absent,other", "--out", str(tmp_path)]) == 0
    found = json.loads(next(tmp_path.glob("*/ops-rms_norm.json")).read_text(encoding="utf-8"))
    assert found["left out"] == {"absent": "is not here"}
    (row,) = found["results"]
    assert row["refused"] == {
        "scaled": "its result is wrong by 0.01 of what it should be",
        "cut": "its result is [3, 5, 31], that of rms_norm is [3, 5, 32]",
        "two": "it gives 2 results where rms_norm gives 1",
        "raises": "'of\\nthe library'",
    }
    assert "right" in row["times"]
    assert not {*wrong} - {"right"} & {*row["times"]}
    out = capsys.readouterr().out
    assert out.startswith("not timed: absent: is not here\n")
    assert "  cut: not timed: its result is [3, 5, 31]" in out
    folder = next(tmp_path.iterdir())
    assert "rms_norm, a transformer block, float32, right" in {c.name for c in compare(folder, folder).changes}

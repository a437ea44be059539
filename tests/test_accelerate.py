"""`accelerate`: the same numbers as plain diffusers, and what the report says of it."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import diffkern
from diffkern.backend import forced_backend
from diffkern.integrations.accelerate import _check_version
from diffkern.integrations.modules.base import Accelerated
from diffkern.op import Op

pytest.importorskip("diffusers")

from diffusers_models import MODELS, make, run


@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_plain(name: str) -> None:
    model = make(name)
    want = run(model, name)
    report = diffkern.accelerate(model)
    assert report.replaced
    delta = (run(model, name) - want).abs().max() / want.std()
    assert 0 < delta <= 1e-4  # zero would be diffusers' own kernels


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_near_as_plain(name: str) -> None:
    """The error against float32 is no larger than that of diffusers, by the root of its mean square: the largest of a
    few thousand roundings is a matter of luck."""
    exact = run(make(name), name)
    model = make(name, torch.bfloat16)
    plain = (run(model, name, torch.bfloat16) - exact).square().mean().sqrt()
    diffkern.accelerate(model)
    ours = (run(model, name, torch.bfloat16) - exact).square().mean().sqrt()
    assert 0 < ours <= 1.1 * plain


@pytest.mark.parametrize("name", MODELS)
def test_restore_leaves_no_trace(name: str) -> None:
    model = make(name)
    before = {key: (type(m), dict(vars(m))) for key, m in model.named_modules()}
    want = run(model, name)
    diffkern.accelerate(model)
    run(model, name)
    diffkern.restore(model)
    after = {key: (type(m), dict(vars(m))) for key, m in model.named_modules()}
    assert before == after
    assert torch.equal(run(model, name), want)


def test_report() -> None:
    model = make("SD 1.5")
    model.conv_in = nn.Conv2d(4, 16, 3, padding=1, padding_mode="circular")
    report = diffkern.accelerate(model)
    counts = {entry.name: entry.count for entry in report.replaced}
    assert counts["ResnetBlock2D"] == sum(type(m).__name__ == "ResnetBlock2D" for m in model.modules()) > 0
    assert counts["BasicTransformerBlock"] == 4
    assert counts["Attention"] == 8
    assert [(e.name, e.count) for e in report.missed] == [("Conv2d", 1)]
    ops = ["query_key_value", "linear", "qk_norm_rope", "attention"]
    assert report.as_dict()["replaced"][0] == {"name": "Attention", "count": 8, "ops": ops}
    line = next(line for line in str(report).splitlines() if line.startswith("BasicTransformerBlock"))
    assert line.split()[1] == "4"
    assert "left: its padding is circular" in str(report)


def test_strict_changes_nothing_when_it_refuses() -> None:
    model = make("SD 1.5")
    model.conv_in = nn.Conv2d(4, 16, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match=r"leaves nothing as it is, but diffkern would leave 1 Conv2d"):
        diffkern.accelerate(model, strict=True)
    assert not any(isinstance(m, Accelerated) for m in model.modules())
    diffkern.accelerate(make("SD 1.5"), strict=True)


def test_accelerating_twice_is_as_once() -> None:
    model = make("SD 1.5")
    first, again = diffkern.accelerate(model), diffkern.accelerate(model)
    assert first == again
    diffkern.restore(model)
    assert not any(isinstance(m, Accelerated) for m in model.modules())


def test_backend_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("SD 1.5")
    used: set[str | None] = set()
    choose = Op.choose

    def watch(op: Op, *args: Any) -> Any:
        used.add(forced_backend())
        return choose(op, *args)

    monkeypatch.setattr(Op, "choose", watch)
    diffkern.accelerate(model, backend="reference")
    want = run(model, "SD 1.5")
    assert used == {"reference"}
    used.clear()
    diffkern.accelerate(model)
    run(model, "SD 1.5")
    with diffkern.use_backend("reference"):
        assert torch.equal(run(model, "SD 1.5"), want)
    assert used == {None, "reference"}


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((3,), TypeError, "this takes a diffusers pipeline or a module, not int"),
        ((nn.Conv2d(1, 1, 1), "gpu"), ValueError, "no backend is named 'gpu': choose one of auto, cpu"),
    ],
)
def test_wrong_input(arguments: tuple[Any, ...], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        diffkern.accelerate(arguments[0], **dict(zip(["backend"], arguments[1:], strict=False)))


def test_missing_diffusers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"^accelerate needs diffusers: pip install 'diffkern\[diffusers\]'$"):
        diffkern.accelerate(nn.Conv2d(1, 1, 1))


def test_unknown_version_warns_once_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("DDPM")
    want = run(model, "DDPM")
    monkeypatch.setattr("diffkern.integrations.accelerate.version", lambda name: "0.99.0.dev0")
    _check_version.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"tested with diffusers 0\.35 to 0\.42, not with 0\.99\.0\.dev0"):
            diffkern.accelerate(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            diffkern.accelerate(model)
    finally:
        _check_version.cache_clear()
    assert (run(model, "DDPM") - want).abs().max() <= 1e-4 * want.std()

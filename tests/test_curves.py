"""`diffkern bench curves`: planted cliffs and powers are found, smooth curves have none, what is measured is kept."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sentences import expect_a_sentence

from diffkern.bench import axes, curves, curves_plot, record
from diffkern.bench.axes import AXES, CURVES
from diffkern.bench.cliffs import cliffs, exponent, fixed
from diffkern.bench.compare import compare, load
from diffkern.bench.report import curves as section
from diffkern.bench.rivals import rivals
from diffkern.cli import main
from diffkern.op import OPS

SIZES = (16, 32, 64, 96, 127, 128, 129, 192, 255, 256, 257, 384, 512, 1024)


@pytest.fixture(autouse=True)
def make_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def costs(of: Callable[[int], float], noise: float = 0.05, rounds: int = 9) -> list[list[float]]:
    """Of every size in every round, each with a noise of its own, on a machine that is slower in every third round."""
    draw = random.Random(0)
    return [[of(n) * (1 + r % 3) * draw.uniform(1, 1 + noise) for r in range(rounds)] for n in SIZES]


def found(of: Callable[[int], float], **more: Any) -> list[int]:
    return [cliff.size for cliff in cliffs(SIZES, costs(of, **more))]


SMOOTH: dict[str, tuple[Callable[[int], float], float]] = {
    "fixed": (lambda n: 7.0, 0.0),
    "linear": (lambda n: 3.0 * n, 1.0),
    "quadratic": (lambda n: 0.1 * n * n, 2.0),
    "fixed, then linear": (lambda n: 20.0 + n, 0.96),
    "linear, then quadratic": (lambda n: n + n * n / 100, 1.82),
}


@pytest.mark.parametrize("kind", SMOOTH)
def test_a_smooth_curve_has_no_cliff_and_its_own_power(kind):
    of, power = SMOOTH[kind]
    assert found(of) == []
    assert exponent(SIZES, [of(n) for n in SIZES]) == pytest.approx(power, abs=0.02)


@pytest.mark.parametrize("size", [127, 129, 257, 384])
def test_a_planted_cliff_is_found(size):
    (cliff,) = cliffs(SIZES, costs(lambda n: (1.5 if n == size else 1.0) * n))
    assert cliff.size == size
    assert cliff.p20 <= cliff.times <= cliff.p80
    assert cliff.times == pytest.approx(1.5, abs=0.05)
    assert found(lambda n: (1.2 if n == size else 1.0) * n) == []  # less than the limit


def test_two_bad_sizes_beside_a_good_one_are_two_cliffs():
    assert found(lambda n: (2.0 if n in (127, 129) else 1.0) * n) == [127, 129]


def test_a_jump_that_lasts_is_found_where_it_begins():
    assert found(lambda n: (2.0 if n > 256 else 1.0) * n) == [257]


def test_noise_is_no_cliff():
    rounds = costs(lambda n: n)
    rounds[5] = [cost * (3.0 if r in (1, 4) else 1.0) for r, cost in enumerate(rounds[5])]
    assert cliffs(SIZES, rounds) == []
    rounds = costs(lambda n: n)
    rounds[5] = [cost * (1.0 if r in (1, 4, 6) else 3.0) for r, cost in enumerate(rounds[5])]
    assert cliffs(SIZES, rounds) == []  # three rounds in nine say otherwise: more than a fifth


def test_a_power_is_that_of_the_end_without_cliffs():
    of = [(3.0 if n == 512 else 1.0) * n for n in SIZES]
    assert exponent(SIZES, of, without=[512]) == pytest.approx(1.0)
    assert exponent(SIZES, of) != pytest.approx(1.0, abs=0.05)
    assert exponent([127, 128, 129], [1.0, 2.0, 3.0]) is None
    assert exponent([], []) is None


def test_what_is_fixed_is_told_from_what_each_n_adds():
    assert fixed([1, 2, 5, 50], [7.0, 9.0, 15.0, 105.0]) == pytest.approx((5.0, 2.0))
    assert fixed([1], [7.0]) is None


def test_every_axis_has_its_curves():
    assert AXES == ("batch", "resolution", "channels", "sequence", "steps")
    for curve in CURVES:
        assert list(curve.sizes) == sorted(set(curve.sizes)), f"{curve.name} is not in order"
        assert (curve.op is None) == (curve.args is None) != (curve.network is None)
    assert {curve.axis for curve in CURVES if curve.quick} == set(AXES)


def run(*args: str) -> int:
    return main(["bench", "curves", "--rounds", "2", "--dtype", "float32", "--out", "here", *args])


def rows(axis: str) -> list[dict[str, Any]]:
    (path,) = Path("here").glob(f"*/curves-{axis}.json")
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def small(monkeypatch: pytest.MonkeyPatch, *names: str, sizes: Sequence[int] = (2, 3, 4)) -> None:
    """Only these curves, at small sizes."""
    chosen = [dataclasses.replace(c, sizes=tuple(sizes)) for c in CURVES if c.name in names]
    monkeypatch.setattr(axes, "CURVES", tuple(chosen))


def test_a_run_is_recorded_printed_and_drawn(monkeypatch, capsys):
    small(monkeypatch, "attention")
    assert run("--plot", "it.png", "--rivals", "eager") == 0
    (row,) = rows("sequence")
    assert (row["curve"], row["dtype"], row["rounds"], row["refused"]) == ("attention", "float32", 2, {})
    assert [point["size"] for point in row["points"]] == [2, 3, 4]
    assert set(row["findings"]) == {"diffkern", "torch"}
    for point in row["points"]:
        for figures in point["variants"].values():
            assert 0 < figures["us"]["p20"] <= figures["us"]["median"] <= figures["us"]["p80"]
            assert 0 <= figures["MB"] < 1
        assert point["variants"]["torch"]["diffkern is faster by"]["median"] > 0
    out = capsys.readouterr().out
    assert "attention, float32: 4 heads of 64 numbers" in out
    assert "tokens" in out
    with Image.open("it.png") as image:
        assert image.size[0] > 500
    (path,) = Path("here").glob("*/*.json")
    timed = load(path)
    assert timed is not None
    assert "attention, 3 tokens, float32, torch" in timed.timings
    assert {c.verdict for c in compare(path, path).changes} == {"noise"}


def test_a_record_does_not_say_where_its_plot_is(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diffkern", "bench", "curves", "--plot", "/home/me/it.png", "--quick"])
    assert record.machine()["command"] == "diffkern bench curves --quick"


def test_a_network_is_held_against_diffusers(monkeypatch):
    small(monkeypatch, "emoji-32", sizes=(1, 2))
    assert run("--rivals", "diffusers") == 0
    (row,) = rows("batch")
    assert set(row["findings"]) == {"diffkern", "diffusers"}
    assert {"fixed, us", "each n, us"} <= set(row["findings"]["diffkern"]["time"])
    # What is not the same picture is not timed.
    monkeypatch.setattr(curves, "wrong", lambda delta, dtype: "another result")
    assert run("--rivals", "none") == 1
    (row,) = rows("batch")
    assert row["refused"] == {"1, diffkern": "another result", "2, diffkern": "another result"}
    assert row["findings"] == {}


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    small(monkeypatch, "attention")
    op = OPS["attention"]
    monkeypatch.setattr(
        op, "backends", [dataclasses.replace(b, run=lambda *a, b=b: b.run(*a) + 1e-2) for b in op.backends]
    )
    assert run("--rivals", "eager") == 1
    (row,) = rows("sequence")
    assert set(row["findings"]) == {"torch"}
    assert set(row["refused"]) == {"2, diffkern", "3, diffkern", "4, diffkern"}
    assert "times what is allowed" in capsys.readouterr().out


def test_without_diffusers_ops_are_measured(monkeypatch, capsys):
    small(monkeypatch, "attention", "DiT-S/2", sizes=(4,))
    absent = dataclasses.replace(rivals()["diffusers"], why_not=lambda device: "diffusers is not installed")
    monkeypatch.setitem(rivals(), "diffusers", absent)
    assert run() == 0
    assert "without diffusers: diffusers is not installed" in capsys.readouterr().out
    assert [row["curve"] for row in rows("sequence")] == ["attention"]


def test_ctrl_c_keeps_what_is_done(monkeypatch, capsys):
    small(monkeypatch, "attention", "group_norm_silu", sizes=(32,))
    measure = curves.measure

    def stopped(curve, *args):
        if curve.name == "attention":
            raise KeyboardInterrupt
        return measure(curve, *args)

    monkeypatch.setattr(curves, "measure", stopped)
    assert run("--rivals", "none") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "diffkern bench: stopped; 1 curves were measured"
    assert [row["curve"] for row in rows("channels")] == ["group_norm_silu"]


WRONG = {
    ("--axis", "width"): "no axis is named 'width': choose one of batch, resolution, channels, sequence, steps",
    ("--dtype", "float16"): "no dtype is named 'float16': choose one of float32, bfloat16",
    ("--rivals", "eager,jax"): "no rival is named 'jax': choose one of eager, compile, ",
    ("--rounds", "0"): "--rounds must be at least 1, not 0",
    ("--threads", "0"): "--threads must be at least 1, not 0",
    ("--plot", "it.txt"): "cannot draw it.txt: give a name that ends in .png, .svg, .pdf",
    ("--plot", "no/it.png"): "cannot write no/it.png: no is not a folder",
}


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_input_gets_a_sentence(args, capsys):
    expect_a_sentence(lambda: main(["bench", "curves", *args]), WRONG[args], capsys)


def planted() -> dict[str, Any]:
    """A row with a cliff at 257, of 4 times the time, and half the memory of a rival without one."""
    sizes = (64, 128, 256, 257, 512, 1024)

    def figures(us: float, mb: float, **more: Any) -> dict[str, Any]:
        return {"us": {"median": us, "p20": 0.9 * us, "p80": 1.1 * us}, "MB": mb, **more}

    def finding(*cliff: int) -> dict[str, Any]:
        steep = [{"size": size, "times": 4.0, "p20": 3.9, "p80": 4.1} for size in cliff]
        return {"time": {"exponent": 2.0, "cliffs": steep}, "memory": {"exponent": 1.0, "cliffs": []}}

    faster = {"diffkern is faster by": {"median": 1.5, "p20": 1.4, "p80": 1.6}}
    points = [
        {
            "size": n,
            "variants": {
                "diffkern": figures(n * n / 100 * (4 if n == 257 else 1), n / 100),
                "torch": figures(n * n / 50, n / 50, **faster),
            },
        }
        for n in sizes
    ]
    return {
        "curve": "attention", "axis": "sequence", "what": "4 heads", "size": "tokens", "n": "tokens", "power": 1,
        "dtype": "float32", "rounds": 5, "points": points, "refused": {"64, xla": "it is not here"},
        "findings": {"diffkern": finding(257), "torch": finding()},
    }  # fmt: skip


def test_what_is_drawn_is_shared_out_over_n():
    time, memory, *theirs = curves_plot.lines([planted()])
    assert time.costs[64] == pytest.approx((0.64, 0.576, 0.704))  # us a token
    assert time.cliffs == (257,)
    assert memory.costs == {n: (pytest.approx(0.01),) * 3 for n in (128, 256, 257, 512, 1024)}  # 64 takes under 1 MB
    assert (memory.cliffs, theirs[0].cliffs) == ((), ())
    panels = curves_plot.figure([time, memory, *theirs]).axes
    assert [panel.get_ylabel() for panel in panels] == ["time / tokens", "memory / tokens"]
    assert [text.get_text() for text in panels[0].texts] == ["257"]
    close = dataclasses.replace(time, cliffs=(128, 256, 257))
    assert [text.get_text() for text in curves_plot.figure([close, memory]).axes[0].texts] == ["128", "256, 257"]
    assert [list(line.get_xdata()) for line in panels[1].lines] == [[128, 256, 257, 512, 1024], [64, *memory.costs]]


def test_a_report_says_where_the_cliffs_are():
    devices = {"cpu": "a CPU, 2 of 2 threads, AVX2"}
    machine = {"devices": devices, "versions": {"torch": "2.13.0"}, "threads": 2}
    measured = {"machine": machine, "results": [planted()], "file": "a/curves-sequence.json"}
    assert (
        "| attention, float32 | tokens | ~ n^2.00 | ~ n^1.00 | time at 257: 4.00 times | torch | none | 1.50 |"
        in section.details([measured])
    )
    details = section.details([measured])
    assert "| 257 | 2642 (2378 to 2906) | 10.3 us | 2.57 MB |" in details
    assert "| 1.50 (1.40 to 1.60) | diffkern: 4.00 times the time |" in details
    assert "Not timed: 64, xla: it is not here." in details
    assert len(section.data([measured])) == 4


def test_costs_in_words():
    assert [curves.duration(us) for us in (0.0, 0.25, 12.0, 1234.0, 2e6)] == [
        "0 ns",
        "250 ns",
        "12 us",
        "1.23 ms",
        "2 s",
    ]
    assert [curves.volume(mb) for mb in (0.0004, 0.5, 3.0, 2500.0)] == ["400 B", "500 kB", "3 MB", "2.5 GB"]

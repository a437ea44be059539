"""`diffkern likelihood` as a user meets it: the functions' figures, a run that goes on after a kill with the same ones,
and its plot."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from likelihood_runs import T, arguments, read
from PIL import Image
from signals import InCalls

import diffkern
from diffkern import schedules
from diffkern.data import Pictures, load_data
from diffkern.data.emoji import LABELS
from diffkern.likelihood import command, plot
from diffkern.likelihood.ode import ode_log_likelihood
from diffkern.likelihood.record import Record
from diffkern.likelihood.run import METHODS, Settings, identity, run, settings_of
from diffkern.likelihood.vdm import vdm
from diffkern.likelihood.vlb import vlb


def without_times(value):
    """What must be equal, to the bit, in two runs."""
    for result in value["results"]:
        assert result.pop("seconds") >= 0
    return value


def test_the_figures_are_those_of_the_functions(score, folder, capsys):
    assert score("--seed", 3) == 0
    said = capsys.readouterr().out
    kept = read()
    assert kept["complete"] is True
    assert [r["method"] for r in kept["results"]] == ["vlb", "vdm", "ode"]
    (facts,) = kept["data"].values()
    assert facts["names"] == [f"picture-{i}" for i in range(5)]
    assert facts["labels"] == "none"

    model = diffkern.load(folder)
    x = load_data(folder / "pictures", (3, 8, 8)).images
    ode = ode_log_likelihood(
        model, x, solver="heun", steps=3, divergence="difference", dequantization="uniform", repeats=2, seed=3
    )
    for result, expected in zip(
        kept["results"],
        (vlb(model, x, seed=3), vdm(model, x, points=T - 1, seed=3), ode),
        strict=True,
    ):
        # as in another batch, where libraries may add up in another order
        torch.testing.assert_close(
            torch.tensor(result["log_p"], dtype=torch.float64), expected.log_p, rtol=1e-5, atol=0
        )
        mean, error = average_of(result)
        assert result["bits_per_dim"] == pytest.approx(mean, rel=1e-12)
        assert result["standard_error"] == pytest.approx(error, rel=1e-12)
        assert set(result["terms"]) == set(expected.terms)
        assert result["evaluations"] >= 5
        for shown in (result["method"], f"{mean:.4f}", f"{error:.4f}", METHODS[result["method"]].figure):
            assert shown in said
        assert f"{result['bits_per_dim']:.4f}" in said
    assert "5 of " in said
    assert "without labels" in said
    assert "float32, backends: " in said
    assert "picture-4" in said, "few pictures are listed"
    assert os.listdir() == ["likelihood.json"]


def average_of(result):
    bits = [-p / (192 * math.log(2)) for p in result["log_p"]]
    return np.mean(bits), np.std(bits, ddof=1) / len(bits) ** 0.5


def test_json_on_standard_output_is_what_the_file_holds(score, capsys):
    assert score("--method", "ode", "-n", 2, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == read()
    assert "backends: " in err


# Dies as by a power cut while it writes the file for the fourth time.
KILLED = """
import math, os, signal, sys
from diffkern import cli
from diffkern.likelihood import record
record.SHARE = math.inf  # written after every part
writes = []
replace = os.replace
def dying(*args):
    writes.append(args)
    if len(writes) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = dying
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_with_the_same_figures(score, folder, capsys):
    assert score("--out", "whole.json") == 0
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments(folder)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    half = read()
    assert half["complete"] is False
    assert [r["scored"] for r in half["results"]] == [3, 0, 0]
    capsys.readouterr()

    assert score() == 0

    assert "goes on after 3 of 15 scores" in capsys.readouterr().out
    assert without_times(read()) == without_times(read("whole.json"))


def test_a_run_can_grow_and_its_figures_stay(score, folder, capsys):
    assert score("--method", "vlb", "-n", 2) == 0
    before = read()
    assert score("--method", "all", "-n", 2, "--data", folder / "pictures", "--data", "noise") == 0
    after = read()
    assert after["results"][0] == before["results"][0], "what is scored is not scored again"
    assert [(r["data"], r["method"]) for r in after["results"]][3:] == [("noise", m) for m in METHODS]
    assert "2 of noise without labels" in capsys.readouterr().out


def test_ctrl_c_and_a_lost_store_say_what_is_kept(score, monkeypatch, capsys):
    calls: list[object] = []
    end: BaseException = KeyboardInterrupt()

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise end
        return vlb(*args, **kwargs)

    monkeypatch.setitem(METHODS, "vlb", METHODS["vlb"]._replace(score=stop))
    assert score("--method", "vlb") == 130
    kept = "what is done is kept in likelihood.json: the same command goes on from there"
    assert capsys.readouterr().err == f"diffkern likelihood: stopped; {kept}\n"
    assert read()["results"][0]["scored"] == 2
    calls, end = [None] * 2, KeyboardInterrupt()
    assert score("--method", "vlb", "--out", "new.json") == 130
    assert capsys.readouterr().err == "diffkern likelihood: stopped; nothing was written\n"
    assert os.listdir() == ["likelihood.json"]
    calls, end = [], ConnectionError("the store of torchrun is lost")
    assert score("--method", "vlb", "--restart") == 2
    assert capsys.readouterr().err == f"diffkern likelihood: {end.args[0]}\n"
    assert end.args[0] == f"the store of torchrun is lost; {kept}"
    assert read()["results"][0]["scored"] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_it_after_a_few_pictures_the_second_at_once(score, monkeypatch, capsys, number, code):
    assert score("--method", "vlb", "--out", "whole.json") == 0
    calls = InCalls(monkeypatch, number)
    calls.choose(8)  # a picture takes 7 calls: 11 transitions and 2 draws of the reconstruction, 2 at a time
    assert score("--method", "vlb") == code
    assert capsys.readouterr().err == (
        "diffkern likelihood: stopping after these pictures; again to stop at once\n"
        "diffkern likelihood: stopped; what is done is kept in likelihood.json: the same command goes on from there\n"
    )
    assert read()["results"][0]["scored"] == 2
    calls.choose(9, 10)
    assert score("--method", "vlb") == code
    assert read()["results"][0]["scored"] == 3
    assert calls.count == 11, "the second one does not wait for the picture's end"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert score("--method", "vlb") == 0
    assert without_times(read()) == without_times(read("whole.json"))


@pytest.mark.parametrize(("terms", "count"), [("all", T - 1), ("4", 4), (None, T - 1)])
def test_terms_are_all_or_some(score, terms, count):
    assert score("--method", "vlb", "-n", 1, *(() if terms is None else ("--terms", terms))) == 0
    assert np.shape(read()["results"][0]["terms"]["transitions"]) == (1, count)


def test_labels_are_used_where_the_model_has_them(folder):
    model = diffkern.load(folder)
    own = Pictures("own", torch.zeros(3, 3, 8, 8), ("a", "b", "c"), torch.tensor([1, 0, 1]), ("Flags", LABELS[0]))
    labels, said = command._labels(model, own, None, unlabelled=False)
    assert labels is not None
    assert labels.tolist() == [0, 2, 0], "by name, not by number"
    assert said == "own"
    assert command._labels(model, own, None, unlabelled=True) == (None, "none")
    labels, said = command._labels(model, own, "food", unlabelled=False)
    assert labels is not None
    assert labels.tolist() == [1, 1, 1]
    assert said == "Food & Drink"
    model.model.null_label = None
    with pytest.raises(ValueError, match="needs a label, which own has not: give --label"):
        command._labels(model, own, None, unlabelled=True)


def test_a_model_is_known_by_its_weights_and_schedule(folder):
    model = diffkern.load(folder)
    before = identity(model)
    assert before == identity(diffkern.load(folder))
    with torch.no_grad():
        next(p for p in model.model.parameters()).view(-1)[-1] += 1e-6
    assert identity(model) != before


def test_the_bar_ends_where_the_work_does(folder, here, capsys):
    model, pictures = diffkern.load(folder), load_data("noise", (3, 8, 8), 3)
    facts = {"noise": {"pictures": 3, "sha256": pictures.digest()}}
    settings = Settings(tolerance=0.1)  # of dopri5, which chooses its steps: the bar only guesses their number
    record = Record.open(Path("a.json"), "tiny", settings_of(model, settings, "auto"), facts, ["vlb", "ode"])
    run(model, [pictures], {"noise": None}, ["vlb", "ode"], settings, record, batch_size=2, progress=True)
    shown = capsys.readouterr().err.split("\r")
    assert "noise, vlb: " in "".join(shown)
    assert shown[-1].startswith("noise, ode: 100%|")
    assert not [line for line in shown if "101%" in line]


def test_a_plot_shows_every_set(score, folder):
    pytest.importorskip("matplotlib")
    assert score("-n", 2, "--data", "noise", "--data", folder / "pictures", "--plot", "terms.png") == 0
    with Image.open("terms.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape == (750, 1650, 3)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # matplotlib's first two: a set each
        drawn = np.abs(pixels - color).max(axis=-1) < 8
        assert drawn[:, :1000].sum() > 300, "a curve"
        assert drawn[:, 1200:].sum() > 100, "totals"
    assert sorted(os.listdir()) == ["likelihood.json", "terms.png"]


@pytest.mark.parametrize(("method", "options"), [(vlb, {"terms": 9}), (vdm, {"points": 9}), (vlb, {})])
def test_the_plot_has_each_term_at_the_timesteps_that_it_was_taken_at(method, options):
    schedule, asked = schedules.cosine(100), []

    def model(x, time):
        asked.extend(time.tolist())
        return x

    n = 20
    method(model, load_data("noise", (1, 2, 2), n).images, schedule, batch_size=n, **options)
    count = options.get("terms", options.get("points", 99))
    taken = torch.tensor(asked, dtype=torch.float64).reshape(-1, n)[-count:]  # a row for each term, the decoder's first

    t, width = plot.timesteps(schedule, method.__name__, count)

    assert width.sum().item() == pytest.approx(99)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), width.cumsum(0)])
    if method is vdm:  # from noise to data
        edges = 99 - edges
        low, high = edges[1:] - 0.5, edges[:-1] + 0.5  # between timesteps they interpolate differently
    else:
        low, high = edges[:-1].floor() + 1, edges[1:].ceil()
    assert ((taken >= low[:, None]) & (taken <= high[:, None])).all()
    assert ((t >= low - 0.5) & (t <= high + 0.5)).all()  # where parts of one timestep lie side by side around it

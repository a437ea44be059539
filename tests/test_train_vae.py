"""The example that trains a VAE on the digits: what it prints and draws, that the seed decides it, and its refusals."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

FILE = Path(__file__).parent.parent / "examples" / "train_vae.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_vae", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_short_training_bounds_and_draws_the_digits(example, tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "vae.png"
    command = ["--levels", "2", "--steps", "25", "--draws", "4", "--out", str(out)]
    assert example.main(command) == 0
    printed = capsys.readouterr().out
    line = r"^(.+?) +(-[\d.]+) ± [\d.]+ nats +([\d.]+) ± [\d.]+ bits/dim$"
    bounds = {name: (float(nats), float(bits)) for name, nats, bits in re.findall(line, printed, re.M)}
    assert list(bounds) == ["train ELBO", "train IWAE, k = 4", "held-out ELBO", "held-out IWAE, k = 4"]
    for part in ("train", "held-out"):
        nats, bits = bounds[f"{part} ELBO"]
        assert nats < bounds[f"{part} IWAE, k = 4"][0]
        assert bits == pytest.approx(-nats / 64 / np.log(2), abs=1e-3)
        assert bits < 3.5  # of 4.09 for one that knows nothing
    terms = re.search(r"reconstruction ([\d.]+), KL of z_1 ([\d.]+), KL of z_2 ([\d.]+);", printed)
    assert terms is not None
    assert sum(map(float, terms.groups())) == pytest.approx(-bounds["held-out ELBO"][0], abs=0.3)
    picture = np.asarray(Image.open(out).convert("L"))
    # The first held-out digit, dark on light, enlarged: at the top left of the right half.
    _, held_out = example.digits()
    scale, margin = example.SCALE, example.MARGIN
    top, left = margin + scale, picture.shape[1] // 2 + margin // 2 + scale
    tile = picture[top : top + 8 * scale : scale, left : left + 8 * scale : scale]
    assert np.abs(tile - (1 - held_out[0, 0].numpy()) * 127.5).max() <= 0.5

    first = out.read_bytes()
    assert example.main(command) == 0
    assert capsys.readouterr().out.rsplit(";", 1)[0] == printed.rsplit(";", 1)[0]  # but for the seconds
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--levels", "0"], "argument --levels: '0' is not a whole number from 1 to 11"),
        (["--steps", "many"], "argument --steps: 'many' is not a whole number from 1 to 1000000"),
        (["--out", "vae.jpg"], "cannot write vae.jpg: give a name that ends in .png, and is no folder"),
        (["--out", "nowhere/vae.png"], "cannot write nowhere/vae.png: nowhere is not a folder"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(example, capsys, command, message):
    try:
        code = example.main(command)
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert capsys.readouterr().err == f"train_vae.py: {message}\n"


def test_without_scikit_learn_it_says_what_to_install(example, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert example.main(["--out", str(tmp_path / "vae.png")]) == 2
    missing = "the digits come with scikit-learn: pip install 'diffkern[digits]'"
    assert capsys.readouterr().err == f"train_vae.py: {missing}\n"
    assert not list(tmp_path.iterdir())

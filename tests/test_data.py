"""The pictures that are scored: which they are, to the level, and one sentence for what does not fit a model."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffkern import pictures
from diffkern.data import DataError, load_data
from diffkern.data.emoji import EMOJI_TEST, FONT, LABELS, is_held_out, read_list

needs_font = pytest.mark.skipif(
    not (FONT.is_file() and EMOJI_TEST.is_file()), reason="needs Debian's fonts-noto-color-emoji and unicode-data"
)


@needs_font
def test_the_held_out_emoji_are_the_179_of_the_model_card():
    held_out = load_data("held-out", (3, 32, 32))
    assert len(held_out) == 179
    assert held_out.images.shape == (179, 3, 32, 32)
    assert held_out.label_names == LABELS
    assert held_out.labels is not None
    by_name = {e.name: e for e in read_list(EMOJI_TEST)}
    for name, label in zip(held_out.names, held_out.labels.tolist(), strict=True):
        assert is_held_out(by_name[name].text)
        assert by_name[name].label == label
    few = held_out.thin(3)
    assert few.names == (held_out.names[0], held_out.names[89], held_out.names[178])
    assert torch.equal(few.images, held_out.images[[0, 89, 178]])


def test_a_missing_font_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr("diffkern.data.emoji.load_emoji.__defaults__", (tmp_path / "no.ttf", EMOJI_TEST, 32))
    with pytest.raises(DataError, match="Debian: "):
        load_data("train", (3, 32, 32))


def test_the_digits_are_those_of_scikit_learn_in_17_levels():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = load_data("digits", (3, 32, 32))
    levels = pictures.to_uint8(digits.images)
    assert levels.shape == (1797, 32, 32, 3)
    assert sorted(set(levels.ravel().tolist())) == [round(255 * k / 16) for k in range(17)]
    original = datasets.load_digits().images
    assert np.array_equal(np.rint(levels[:, ::4, ::4, 0] / 255 * 16), original)
    assert np.array_equal(levels, levels[:, ::4, ::4].repeat(4, axis=1).repeat(4, axis=2)[..., [2, 1, 0]])
    assert load_data("digits", (1, 12, 8), n=5).images.shape == (5, 1, 12, 8)


def test_noise_is_uniform_and_picture_i_always_the_same():
    noise = load_data("noise", (3, 32, 32), n=40)
    levels = pictures.to_uint8(noise.images).astype(np.float64)
    assert levels.min() == 0
    assert levels.max() == 255
    count = levels.size
    assert abs(levels.mean() - 127.5) < 4 * (65535 / 12 / count) ** 0.5  # 4 standard errors of the mean
    assert np.bincount(levels.astype(int).ravel(), minlength=256).min() > count / 256 - 5 * (count / 256) ** 0.5
    assert torch.equal(load_data("noise", (3, 32, 32), n=2).images, noise.images[:2])
    assert len(load_data("noise", (1, 3, 3))) == 64


def test_pngs_come_back_to_the_bit_whatever_their_kind(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    Image.fromarray(levels[0]).save(tmp_path / "b.png")
    Image.fromarray(levels[1]).quantize(20).save(tmp_path / "a.PNG")
    alpha = np.dstack([levels[2], np.array([[0, 255, 255, 0]] * 5, dtype=np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "c.png")
    Image.fromarray(levels[0, ..., 0]).save(tmp_path / "d.png")
    (tmp_path / "notes.txt").write_text("no picture")

    read = load_data(tmp_path, (3, 5, 4))

    assert read.names == ("a", "b", "c", "d")
    assert read.labels is None
    got = pictures.to_uint8(read.images)
    with Image.open(tmp_path / "a.PNG") as palette:
        assert np.array_equal(got[0], np.asarray(palette.convert("RGB")))
    assert np.array_equal(got[1], levels[0])
    assert np.array_equal(got[2], np.where(alpha[..., 3:] > 0, levels[2], 255))
    assert np.array_equal(got[3], np.repeat(levels[0, ..., :1], 3, axis=-1))
    # each level lies on the grid that discrete likelihoods are of
    assert torch.equal(read.images, torch.from_numpy(got).permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_grey_models_take_grey_pictures(tmp_path):
    Image.fromarray(np.arange(20, dtype=np.uint8).reshape(5, 4)).save(tmp_path / "a.png")
    assert load_data(tmp_path, (1, 5, 4)).images.shape == (1, 1, 5, 4)
    Image.new("RGB", (4, 5), "red").save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png has colours: the model's pictures are grey"):
        load_data(tmp_path, (1, 5, 4))


def test_what_differs_in_a_pixel_has_another_digest():
    few = load_data("noise", (1, 2, 2), n=3)
    assert few.digest() == load_data("noise", (1, 2, 2), n=3).digest()
    few.images[2, 0, 1, 1] = -few.images[2, 0, 1, 1]
    assert few.digest() != load_data("noise", (1, 2, 2), n=3).digest()
    assert len(few.digest()) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.png", b"GIF89a", "a.png is no PNG, or a damaged one"),
        ("half.png", None, "half.png is no PNG, or a damaged one"),
        ("wide.png", Image.new("RGB", (9, 5)), "wide.png is 9 x 5 pixels: the model's pictures are 4 x 5"),
        ("deep.png", Image.new("I;16", (4, 5)), "deep.png has more than 8 bits a channel"),
        ("a.jpg", b"", "has no picture whose name ends in .png"),
    ],
)
def test_a_picture_that_does_not_fit_is_named(tmp_path, name, data, said):
    if isinstance(data, Image.Image):
        data.save(tmp_path / name)
    elif data is None:
        Image.effect_noise((4, 5), 99).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    else:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said.replace(".", r"\.")):
        load_data(tmp_path, (3, 5, 4))


@pytest.mark.parametrize(
    ("source", "shape", "said"),
    [
        ("cats", (3, 4, 4), "no data is named 'cats': give a folder of PNGs or one of held-out, train, digits, noise"),
        ("held-out", (1, 28, 28), "the emoji are square and in colour: the model's pictures are 1 x 28 x 28"),
        ("noise", (4, 64, 64), "the model's samples are 4 x 64 x 64, and no pictures of 1 or 3 channels"),
    ],
)
def test_data_that_is_not_there_gets_a_sentence(source, shape, said):
    with pytest.raises(ValueError, match=said):
        load_data(source, shape)
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        load_data("noise", (1, 2, 2), n=0)

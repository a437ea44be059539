"""Model folders as users have them: ddpm-cifar10-32 as it is published, a pipeline's subfolders, labels."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from folders import LABELS, SCHEDULER, write_tiny

import diffkern
from diffkern.models.folder import ModelError

diffusers = pytest.importorskip("diffusers")

# The two configs of google/ddpm-cifar10-32 as published, keys of old versions included.
CIFAR = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
CIFAR_SCHEDULER = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
    "variance_type": "fixed_large",
}  # fmt: skip


def test_ddpm_cifar10_32_loads_as_it_is(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**{k: v for k, v in CIFAR.items() if k[0] != "_"}).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CIFAR))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(CIFAR_SCHEDULER))
    ours = diffkern.load(tmp_path)
    assert sum(p.numel() for p in ours.model.parameters()) == 35_746_307
    assert ours.model.sample_shape == (3, 32, 32)
    assert ours.schedule.prediction == "epsilon"
    assert ours.schedule.clip == 1.0
    assert ours.schedule.alpha_t[-1].item() ** 2 == pytest.approx(4.0358e-05, rel=1e-4)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(x, 321).sample
        assert (ours.model(x, torch.tensor(321.0)) - expected).abs().max() <= 1e-4 * expected.std()


def test_a_pipeline_folder_loads(tmp_path):
    write_tiny(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "unet" / "scheduler_config.json").rename(tmp_path / "scheduler" / "scheduler_config.json")
    (tmp_path / "unet" / "labels.json").rename(tmp_path / "labels.json")
    loaded = diffkern.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.labels == tuple(LABELS)
    assert loaded.model.null_label == 3
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "number"), [("Smileys & Emotion", 0), ("food", 1), ("DRINK", 1), ("emo", 0), ("flags", 2), ("2", 2)]
)
def test_labels_by_name(tmp_path, name, number):
    assert diffkern.load(write_tiny(tmp_path)).label_id(name) == number


def test_without_labels_the_classes_are_numbers(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "labels.json").unlink()
    loaded = diffkern.load(tmp_path)
    assert loaded.label_id("3") == 3
    with pytest.raises(ValueError, match="no label is named '4': choose one of 0, 1, 2, 3"):
        loaded.label_id("4")


WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "scheduler_config.json": [
        ({**SCHEDULER, "beta_schedule": "spiral"}, "scheduler_config.json: .*'spiral': choose one of"),
        ({**SCHEDULER, "num_train_timesteps": "many"}, r"scheduler_config\.json"),
        ({**SCHEDULER, "_class_name": "KarrasVeScheduler"}, "no diffusers scheduler is named 'KarrasVeScheduler'"),
    ],
    "labels.json": [
        ({"labels": "none"}, "labels must be a list of at most 4 names"),
        ({"labels": ["a"] * 5}, "labels must be a list of at most 4 names"),
        ({"labels": ["a"], "null_label": 4}, "null_label must be a class of the model, 0 to 3, not 4"),
    ],
}


@pytest.mark.parametrize(("file", "value", "message"), [(f, v, m) for f in WRONG for v, m in WRONG[f]])
def test_a_wrong_file_gets_a_sentence(tmp_path, file, value, message):
    write_tiny(tmp_path)
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(ModelError, match=message):
        diffkern.load(tmp_path)


def test_no_such_model_names_the_bundled_ones():
    with pytest.raises(ModelError, match="no model is named 'stable-cascade': give a folder with a model or one of"):
        diffkern.load("stable-cascade")

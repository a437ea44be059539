"""A model is known by what it computes with, and by nothing else."""

from __future__ import annotations

import numpy as np
import torch
from graphs import make_prompted

from diffkern.identity import digest
from diffkern.models.unet import UNet2D


def test_a_model_is_known_by_what_it_computes(tiny, tiny_folder):
    model, again = tiny.model, UNet2D.from_folder(tiny_folder)
    assert digest(model) == digest(again)
    again.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert digest(again) == digest(model), "the layout is nothing of the model"
    assert digest(again.double()) != digest(model)
    assert digest(model.forward) != digest(model) != digest(model.conditioning)
    with torch.no_grad():
        again = UNet2D.from_folder(tiny_folder)
        again.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert digest(again) != digest(model)
    assert digest(np.sin) != digest(np.cos)
    prompted, prompt = make_prompted()
    assert digest(prompted.given(prompt)) == digest(prompted.given(prompt.clone()))
    assert digest(prompted.given(prompt)) != digest(prompted.given(-prompt))

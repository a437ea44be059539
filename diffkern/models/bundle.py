"""A trained model with what is needed to use it: network, schedule and the names of its labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffkern.models.dit import DiT
from diffkern.models.folder import WEIGHTS, ModelError, read_json
from diffkern.models.unet import UNet2D
from diffkern.models.unet_condition import UNet2DCondition
from diffkern.scheduler_config import from_diffusers_config
from diffkern.schedules import Schedule

MODELS: dict[str, type[UNet2D] | type[UNet2DCondition] | type[DiT]] = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "DiTTransformer2DModel": DiT,
    "Transformer2DModel": DiT,
}
"""The networks by the class name in their config.json."""
ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class Diffusion:
    """model: the network, ready to sample. schedule: what it was trained with. labels: the names of its classes in
    order, empty if it has none."""

    name: str
    model: UNet2D | UNet2DCondition | DiT
    schedule: Schedule
    labels: tuple[str, ...] = ()

    def label_id(self, name: str) -> int:
        """The number of a label, from its name or the beginning of one of its words, in any case, or its number.
        Raises ValueError naming the labels there are."""
        names = self.labels or tuple(str(i) for i in range(self.model.num_classes))
        if not names:
            raise ValueError(f"{self.name} has no labels to choose from")
        wanted = name.strip().lower()
        if wanted.isdecimal() and int(wanted) < len(names):
            return int(wanted)
        exact = [i for i, label in enumerate(names) if label.lower() == wanted]
        begins = [i for i, label in enumerate(names) if any(w.startswith(wanted) for w in label.lower().split())]
        found = exact or (begins if wanted else [])
        if len(found) == 1:
            return found[0]
        problem = "no label is named" if not found else "more than one label begins with"
        raise ValueError(f"{problem} {name!r}: choose one of {', '.join(names)}")


def bundled() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(config.parent.name for config in ASSETS.glob("*/config.json"))


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Diffusion:
    """A bundled model by name, or a diffusers folder of a `UNet2DModel`, `UNet2DConditionModel` or
    `DiTTransformer2DModel` by path: flat, or a pipeline's with `unet` or `transformer`, and `scheduler`, in it. A
    labels.json, if there, is {"labels": [names], "null_label": number}.

    Raises ModelError, with a sentence that names what is wrong."""
    path = ASSETS / name if str(name) in bundled() else Path(name)
    if not path.is_dir():
        raise ModelError(
            f"no model is named {str(name)!r}: give a folder with a model or one of {', '.join(bundled())}"
        )
    network = next((path / name for name in ("unet", "transformer") if (path / name).is_dir()), path)
    scheduler = path / "scheduler" if (path / "scheduler").is_dir() else path
    if not (network / "config.json").is_file():
        raise ModelError(f"{path} is not a folder with a model (config.json and {WEIGHTS})")
    config = read_json(scheduler / "scheduler_config.json")
    try:
        schedule = from_diffusers_config(config)
    except (ValueError, TypeError, OverflowError) as e:
        raise ModelError(f"{scheduler / 'scheduler_config.json'}: {e}") from None
    class_name = read_json(network / "config.json").get("_class_name", "UNet2DModel")
    if not isinstance(class_name, str) or class_name not in MODELS:
        raise ModelError(f"{network} holds a {class_name}: allowed here is {', '.join(MODELS)}")
    model = MODELS[class_name].from_folder(network, dtype, device)
    labels: tuple[str, ...] = ()
    if (path / "labels.json").is_file():
        labels, null = _labels(path / "labels.json", model.num_classes)
        model.null_label = model.null_label if null is None else null
    return Diffusion(path.name, model, schedule, labels)


def _labels(file: Path, classes: int) -> tuple[tuple[str, ...], int | None]:
    value = read_json(file)
    names, null = value.get("labels"), value.get("null_label")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) > classes:
        raise ModelError(f"{file}: labels must be a list of at most {classes} names, the classes of the model")
    if null is not None and not (isinstance(null, int) and 0 <= null < classes):
        raise ModelError(f"{file}: null_label must be a class of the model, 0 to {classes - 1}, not {null!r}")
    return tuple(names), null

"""Where a convolution gives the moments of its result, and in which cut of our own kernel: where a table says that with
them it and the norm behind it took less time than without. No Triton here: a network asks this wherever it runs."""

import functools

from torch import Tensor

from . import configs
from .conv2d_cuts import CUTS, why_not


def facts(size: int, pixels: int, channels: int) -> str:
    """What a table tells results apart by: bytes of a number, pixels of a picture, channels."""
    return configs.key(bytes=size, pixels=1 << (pixels - 1).bit_length(), channels=channels)


def _call(x: Tensor, channels: int, stride: int, upsample: bool) -> tuple[int, int, int]:
    return x.element_size(), x.shape[2] * x.shape[3] * (4 if upsample else 1) // stride**2, channels


def tuning(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: list[int] | None, add: Tensor | None,
    residual: Tensor | None, activation: str, upsample: bool, arch: int,
) -> tuple[str, list[configs.Shape]]:  # fmt: skip
    """For the op's arguments: the entry of the table that is theirs, and what to try. Without a cut, moments are those
    of the convolution that is chosen without them; so they are where a cut has none."""
    sides = (1, 1, 1, 1) if padding is None else tuple(padding) * (4 // len(padding))
    cuts = () if arch < 90 or why_not(x, weight, stride, sides, upsample) else CUTS
    shapes = [{"MOMENTS": 0}, {"MOMENTS": 1}, *({"MOMENTS": 1, **cut._asdict()} for cut in cuts)]
    return facts(*_call(x, len(weight), stride, upsample)), shapes


@functools.cache
def _found(call: tuple[int, int, int], arch: int) -> configs.Shape:
    entry = configs.tuned("conv2d_moments", facts(*call), arch)
    return {} if entry is None else entry.shape


def _shape(x: Tensor, channels: int, stride: int, upsample: bool) -> configs.Shape:
    call = _call(x, channels, stride, upsample)
    shape = configs.on_trial("conv2d_moments", lambda: facts(*call))
    if shape is None:
        shape = _found(call, configs.architecture(x.device)) if x.is_cuda else {}
    return shape


def pays(x: Tensor, channels: int, stride: int, upsample: bool) -> bool:
    """Whether a convolution of x to so many channels should give its moments. What was not measured does not pay."""
    return bool(_shape(x, channels, stride, upsample).get("MOMENTS", 0))


def cut_with_moments(x: Tensor, channels: int, stride: int, upsample: bool) -> configs.Shape:
    """The cut of our own kernel that such a convolution then takes, if the table has one."""
    shape = _shape(x, channels, stride, upsample)
    return {name: value for name, value in shape.items() if name != "MOMENTS"}

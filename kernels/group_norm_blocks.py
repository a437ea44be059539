"""Where `group_norm_silu` in CUDA reads its input once, by clusters of blocks, and how much of it a block takes: by
what a table says was the fastest. No Triton here: it is asked where there is none, too."""

import functools

from torch import Tensor

from . import configs

IN_TWO = 0  # a block: in two kernels, which read the input twice
BLOCKS = (16, 32, 64, 96)  # KB that a block may keep in registers, where clusters read it once


def facts(size: int, pixels: int, channels: int, groups: int) -> str:
    """What a table tells calls apart by: bytes of a number, pixels of a picture, all channels, groups."""
    return configs.key(bytes=size, pixels=configs.power_of_2(pixels), channels=channels, groups=groups)


def call_of(x: Tensor, groups: int, skip: Tensor | None) -> tuple[int, int, int, int]:
    """What `facts` are of."""
    return x.element_size(), x.shape[2:].numel(), x.shape[1] + (0 if skip is None else skip.shape[1]), groups


def tuning(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, add: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, skip: Tensor | None, moments: Tensor | None,
    skip_moments: Tensor | None, arch: int,
) -> tuple[str, list[configs.Shape]]:  # fmt: skip
    """For the op's arguments: the entry of the table that is theirs, and what to try: Triton's kernel, which has no
    shapes, and CUDA's for channels_last."""
    in_cuda = [] if x.is_contiguous() else [{configs.CUDA: block} for block in (IN_TWO, *BLOCKS)]
    return facts(*call_of(x, num_groups, skip)), [{}, *in_cuda]


@functools.lru_cache(1024)
def _found(call: tuple[int, int, int, int], arch: int) -> configs.Tuned | None:
    return configs.tuned("group_norm_silu", facts(*call), arch)


def measured(x: Tensor, groups: int, skip: Tensor | None) -> configs.Tuned | None:
    """What was measured of such a call on this architecture, or None."""
    arch = configs.architecture(x.device)
    return _found(call_of(x, groups, skip), arch) if configs.is_tuned("group_norm_silu", arch) else None


def cuda_block(x: Tensor, groups: int, skip: Tensor | None) -> int:
    """KB of a block of CUDA's kernels: on trial, else what was measured as fastest, else in two kernels. By the shape
    of a sample alone."""
    shape = configs.on_trial("group_norm_silu", lambda: facts(*call_of(x, groups, skip)))
    if shape is not None:
        return shape[configs.CUDA]
    found = measured(x, groups, skip)
    return IN_TWO if found is None or found.cuda_block is None else found.cuda_block

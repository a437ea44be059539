"""What the configs of diffusers' UNets have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from diffkern.models import folder

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


@dataclass(frozen=True)
class UNetConfig:
    """The keys that the configs share and that shape the network, with diffusers' defaults."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ()
    mid_block_type: str | None = None
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = ()
    layers_per_block: int | tuple[int, ...] = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    class_embed_type: str | None = None
    num_class_embeds: int | None = None

    CLASS_NAME: ClassVar[str]  # of diffusers
    # What this implementation can do, where diffusers can do more.
    ALLOWED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "time_embedding_type": ("positional",),
        "act_fn": ("silu", "swish"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None,),
    }
    BLOCKS: ClassVar[dict[str, tuple[str, ...]]]  # the same, for lists of names

    def __post_init__(self) -> None:
        for f in fields(self):
            folder.check_type(f.name, getattr(self, f.name), str(f.type))
        for key, allowed in self.ALLOWED.items():
            folder.check_choice(key, getattr(self, key), allowed)
        for key, allowed in self.BLOCKS.items():
            for block in getattr(self, key):
                folder.check_choice(key, block, allowed)
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.block_out_channels):
            raise folder.ModelError("down_block_types, up_block_types and block_out_channels differ in length")
        self.check_range("norm_num_groups", 1, 65536)
        self.check_range("layers_per_block", 1, 64)
        self.check_range("block_out_channels", 1, 65536)
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise folder.ModelError(
                    f"block_out_channels has {channels}, which norm_num_groups {self.norm_num_groups} does not divide"
                )

    def check_range(self, key: str, low: int, high: int) -> None:
        """Check a number, or that of each level. Raises ModelError if one is out of range or a level has none."""
        value = getattr(self, key)
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(v is not None and low <= v <= high for v in values):
            raise folder.ModelError(f"config.json has {key} {value!r}: allowed here is {low} to {high}")
        if isinstance(value, tuple) and len(value) != len(self.block_out_channels):
            raise folder.ModelError(
                f"config.json has {key} {value!r}, which is not one for each of {len(self.block_out_channels)} levels"
            )

    def per_level(self, value: T | tuple[T, ...]) -> tuple[T, ...]:
        """One value a level, from the top, of a key that may have one for all."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Read a diffusers config. Raises ModelError naming a value that this implementation cannot build."""
        return cls(**folder.values_of(cls, config))

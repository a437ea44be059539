"""What all fused schedulers share: from a row of coefficients to one `sampler_step`, and the noise in it.

A family's `fused_step` says which row a call is and which of the scheduler's tensors it reads. Rows are made in float64
from the scheduler's own noise levels when they are first needed, and stay on the device: a loop that steps through them
never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple

import torch
from numpy.linalg import LinAlgError
from torch import Tensor

from diffkern.backend import forced_backend
from diffkern.layout import accumulate
from diffkern.ops.randn import noise_keys
from diffkern.ops.sampler_step import (
    MAKES_INPUT,
    MAKES_NEXT,
    NEXT,
    TERMS,
    WIDTH,
    sampler_step,
)
from diffkern.samplers.grid import Point
from diffkern.samplers.table import END, H2, Row, Weights

# What a step depends on beside its arguments. A change makes another tensor, another config or another version.
_LEVELS = ("sigmas", "timesteps", "alphas_cumprod", "final_alpha_cumprod")
_SETTINGS = ("_internal_dict", "num_inference_steps", "variance_type", "predict_x0")
_SOURCES = (*_LEVELS, *_SETTINGS)


class NoRow(ValueError):
    """A step has no finite coefficients."""


class Result(NamedTuple):
    """prev_sample in the dtype asked for; the other two in that of the state, without elements unless asked for."""

    prev_sample: Tensor
    base: Tensor
    history: Tensor


class Plan(NamedTuple):
    """How a step is made of its tensors. state: the dtype that they are kept in. results: those of the op that are
    made. table: the row, float32 (or float64) [2, 32] with the end of its table; row: which one that is for each
    sample, int64 [B]; keys: of counter noise, int64 [B, 2]. kernel: what the op chooses for dense tensors."""

    state: torch.dtype
    results: int
    table: Tensor
    row: Tensor
    keys: Tensor | None
    kernel: Callable[..., tuple[Tensor, ...]]


class Levels:
    """The noise levels of a scheduler on the host, read once, and what was made from them so far."""

    def __init__(self, sources: tuple[Any, ...], reason: str | None, last: Levels | None) -> None:
        self.sources, self.reason = sources, reason  # which keeps them, so that no other object gets their address
        self.addresses = tuple(map(id, sources))
        # A tensor made in inference mode counts no versions: only that it is another one can be noticed.
        self.counted = [s for s in sources if isinstance(s, Tensor) and not s.is_inference()]
        self.versions = [t._version for t in self.counted]
        self.version_at = dict(zip(map(id, self.counted), self.versions, strict=True))
        on_host = [s.cpu() if isinstance(s, Tensor) else None for s in sources[: len(_LEVELS)]]
        self.host_timesteps, self.host_alphas_cumprod = on_host[1:3]
        self.values: tuple[Any, ...] = tuple(
            # Timesteps that are set anew leave the training's thousand levels as they are.
            last.values[i] if last is not None and last.has(i, s) else [] if t is None else t.tolist()
            for i, (s, t) in enumerate(zip(sources, on_host, strict=False))
        )
        self.sigmas, self.timesteps, self.alphas_cumprod, final = self.values
        self.final_alpha_cumprod: float = final or 1.0  # DDPM has none, and ends without noise
        # Timesteps that are set anew are most often the same.
        settings = slice(len(_LEVELS), None)
        same = (
            last is not None and last.values == self.values and all(map(is_, last.sources[settings], sources[settings]))
        )
        self.made: dict[Hashable, Any] = last.made if last is not None and same else {}

    def holds(self, sources: tuple[Any, ...]) -> bool:
        return tuple(map(id, sources)) == self.addresses and [t._version for t in self.counted] == self.versions

    def has(self, i: int, source: Any) -> bool:
        """Whether the values of source i are still these."""
        version = self.version_at.get(id(source))
        return source is self.sources[i] and version is not None and version == source._version


class FusedScheduler:
    """Mixed into a diffusers scheduler, which owns config, timesteps and state."""

    output = "SchedulerOutput"
    fused_step: Callable[..., tuple[Tensor, ...]]  # the arguments of `step` by their names -> the fields of its output
    counter_seed: int | None = None  # None: diffusers' own noise
    _levels: Levels | None = None

    @classmethod
    def why_not(cls, scheduler: Any) -> str | None:
        """The reason that a scheduler's options are not a table of coefficients, or None."""
        raise NotImplementedError

    def is_regular(self, call: dict[str, Any]) -> bool:
        """Whether a row describes this call of `step`; it has the arguments by their names."""
        raise NotImplementedError

    def noise_levels(self) -> list[Point]:
        """The points whose alpha and sigma `add_noise` looks up."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """All but the rows, which are made again."""
        return {name: value for name, value in vars(self).items() if name != "_levels"}

    @property
    def levels(self) -> Levels:
        """As of the last `look`."""
        assert self._levels is not None
        return self._levels

    def look(self) -> Levels:
        """Read the noise levels, if others were set since. At the start of every call: it is what makes rows true."""
        sources = tuple(map(vars(self).get, _SOURCES))
        if self._levels is None or not self._levels.holds(sources):
            self._levels = Levels(sources, self.why_not(self), self._levels)
        return self._levels

    def apply(
        self,
        key: Hashable,
        make: Callable[[], Row],
        m: Tensor,
        x: Tensor,
        *,
        dtype: torch.dtype,
        wide: bool = True,
        also: int = 0,
        noise: Tensor | None = None,
        draw: int = 0,
        base: Tensor | None = None,
        h0: Tensor | None = None,
        h1: Tensor | None = None,
        h2: Tensor | None = None,
    ) -> Result:
        """One `sampler_step` with the row of `key`, made by `make` when it is new.

        dtype: of prev_sample. wide: whether the state, x and all that follows, is in float32, or else as it is given if
        m and x have one dtype. also: MAKES_BASE and MAKES_HISTORY, if they are to be made. noise: what a noisy row
        adds; without it the op draws the counter noise number `draw`.
        Raises ValueError unless model output and sample have one shape, and NoRow."""
        if m.shape != x.shape:
            raise ValueError(f"model_output must have the shape of sample, {list(x.shape)}, not {list(m.shape)}")
        given = noise is not None
        shared = (key, given, draw, dtype, wide, also, m.dtype, x.dtype, x.device, len(x), forced_backend())
        plan: Plan | None = self.levels.made.get(shared)
        if plan is None:
            plan = self.levels.made[shared] = self._plan(make, m, x, dtype, wide, also, given, draw)
        # Given noise goes in as the oldest history entry, which no sampler with noise reads.
        past = (base, h0, h1, noise if given else h2)
        state = [t if t is None or t.dtype == plan.state else t.to(plan.state) for t in (x, *past)]
        run = plan.kernel if _need_no_dispatch(m, *state) else sampler_step
        done = run(state[0], m, plan.table, plan.row, plan.keys, None, *state[1:], plan.results)
        prev = done[1] if plan.results & MAKES_INPUT else done[0]
        return Result(prev if prev.dtype == dtype else prev.to(dtype), done[2], done[3])

    def draw_noise(self, m: Tensor, generator: Any, dtype: torch.dtype) -> Tensor | None:
        """The noise that diffusers would draw for a step, or None when the op is to draw it."""
        if self.counter_seed is not None:
            return None
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor(m.shape, generator=generator, device=m.device, dtype=dtype)

    def mix(self, original: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """alpha original + sigma noise at the `noise_levels` of index: int64 [B] or [1]."""

        def make() -> Tensor:
            points = torch.tensor([(p.alpha, p.sigma) for p in self.noise_levels()], dtype=torch.float64)
            data = torch.zeros(len(points) + 1, WIDTH, dtype=torch.float64)
            data[:-1, NEXT + TERMS.index("x")], data[:-1, NEXT + TERMS.index("m")] = points.unbind(-1)
            return data.to(original.device, acc, non_blocking=True)

        self.look()
        dtype = torch.promote_types(original.dtype, noise.dtype)
        acc = accumulate(dtype)
        made = self.levels.made
        if (key := ("mix", original.device, acc)) not in made:
            made[key] = make()
        row = index.to(original.device, torch.int64).flatten().expand(len(original)).contiguous()
        state = original if original.dtype == noise.dtype else original.to(acc)
        return sampler_step(state, noise, made[key], row, results=MAKES_NEXT)[0].to(dtype)

    def _plan(
        self, make: Callable[[], Row], m: Tensor, x: Tensor, dtype: torch.dtype, wide: bool, also: int, given: bool,
        draw: int,
    ) -> Plan:  # fmt: skip
        try:
            row = make()
            row.check(type(self).__name__, 0)
        except (ZeroDivisionError, LinAlgError, ValueError):
            raise NoRow("a step needs noise levels that differ from those before and after: take fewer steps") from None
        if given:
            row = replace(row, next=Weights(row.next) + row.noise * H2, noise=0.0)
        acc = accumulate(torch.promote_types(m.dtype, x.dtype))
        state = x.dtype if m.dtype == x.dtype and not wide else acc
        results = also | (MAKES_INPUT if dtype == m.dtype != state else MAKES_NEXT)
        table = torch.tensor([row.columns(draw), END], dtype=acc).to(x.device, non_blocking=True)
        index, keys = torch.zeros(len(x), dtype=torch.int64, device=x.device), None
        if draw and not given:
            assert self.counter_seed is not None, "a noisy row without noise"
            keys = noise_keys(self.counter_seed, len(x), x.device)
        kernel = sampler_step.choose(sampler_step.bind(x.to(state), m, table, index, keys)).run
        return Plan(state, results, table, index, keys, kernel)


def _need_no_dispatch(*tensors: Tensor | None) -> bool:
    """Whether a kernel can be called with them as they are. The op's way to it, by torch's dispatcher and through all
    that a kernel may be asked for, takes several times as long as a small step."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(t is None or (type(t) is Tensor and t.is_contiguous()) for t in tensors)

"""What the tests of graphs share: networks, the loop as it was before there were steps, and a count of what is done."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern.graphs import kept, tape
from diffkern.graphs.recorder import Recording
from diffkern.models.dit import DiT, DiTConfig
from diffkern.models.unet_condition import UNet2DCondition, UNet2DConditionConfig
from diffkern.samplers import SAMPLERS, Table, graph
from diffkern.schedules import Schedule, cosine, edm, flow

SHAPE = (3, 6, 5)
SCHEDULES: dict[str, Schedule] = {"edm": edm(1000), "flow_euler": flow(1000)}


def table(name: str = "dpmpp_2m", steps: int = 9, **options: Any) -> Table:
    return diffkern.make_table(name, SCHEDULES.get(name, cosine(1000, prediction="v")), steps, **options)


# Every sampler, and those that read more history.
TABLES: dict[str, Callable[[], Table]] = {
    **{name: partial(table, name) for name in SAMPLERS},
    "unipc, order 3": partial(table, "unipc", order=3),
    "deis, order 3": partial(table, "deis", order=3),
    "ddim, eta 1": partial(table, "ddim", eta=1.0),
}


class Pointwise(nn.Module):
    """A network that is told the timestep and labels, whose output is channels_last or as its input."""

    def __init__(self, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.weight = nn.Parameter(torch.tensor([0.5, 0.6, 0.7]).reshape(3, 1, 1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = 0 if labels is None else labels.reshape(-1, 1, 1, 1) * 0.1
        y = torch.tanh(x) * self.weight - t.reshape(-1, 1, 1, 1) / 2000 + shift
        return y.contiguous(memory_format=torch.channels_last) if self.channels_last else y


def make_dit() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, num_embeds_ada_norm=4
    )
    return DiT(config).eval()


def make_prompted() -> tuple[UNet2DCondition, Tensor]:
    """A UNet that takes a prompt, and one for the two halves of a guided batch: [2, 5, 16]."""
    torch.manual_seed(0)
    config = UNet2DConditionConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=1,
        cross_attention_dim=16,
    )
    return UNet2DCondition(config).eval(), torch.randn(2, 5, 16)


@torch.no_grad()
def plain_loop(
    model: nn.Module, table: Table, n: int, seed: int = 0, labels: Tensor | None = None, guidance: float | None = None
) -> list[Tensor]:
    """The states of a run in one batch, the noise first, by nothing but calls of the model and of the op."""
    device = next(model.parameters()).device
    rows, keys = table.data.to(device, torch.float32), diffkern.noise_keys(seed, n, device)
    x = table.init_scale * diffkern.randn(keys, list(SHAPE))
    doubled, scale = 1, None
    if guidance is not None and labels is not None:
        doubled, scale = 2, torch.full((n,), guidance, device=device)
        labels = torch.cat([torch.zeros_like(labels), labels])
    seen, states = (rows[0, 1] * x).repeat(doubled, 1, 1, 1), [x]
    base, past = (torch.zeros_like(x) if table.uses_base else None), [torch.zeros_like(x)] * table.history
    for i, timestep in enumerate(table.timesteps):
        t = torch.full((doubled * n,), timestep, device=device)
        output = model(seen, t, *(() if labels is None else (labels,)))
        if i == 0 and not output.is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        row = torch.full((n,), i, device=device)
        x, seen, base_next, entry = diffkern.sampler_step(
            x, output, rows, row, keys if table.noisy else None, scale, base, *past, *[None] * (3 - len(past))
        )
        base = None if base is None else base_next
        past = [entry, *past][: len(past)]
        states.append(x)
    return states


class CPURecorder(tape.Recorder):
    """Counts what it does."""

    last: CPURecorder

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.pools = self.records = self.replays = 0
        CPURecorder.last = self

    def new_pool(self) -> None:
        self.pools += 1

    def record(self, run: Callable[[], Any], given: Sequence[Tensor] = (), weights: Iterable[Tensor] = ()) -> Recording:
        self.records += 1
        recording = super().record(run, given, weights)

        def replay(given: Sequence[Tensor] = ()) -> Any:
            self.replays += 1
            return recording.replay(given)

        return recording._replace(replay=replay)


@contextlib.contextmanager
def counted() -> Iterator[pytest.MonkeyPatch]:
    """Inside, recordings and replays on the CPU are counted, and networks have none from before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kept.RECORDERS, "cpu", CPURecorder)
        patch.setattr(graph, "_of_network", weakref.WeakKeyDictionary())
        yield patch

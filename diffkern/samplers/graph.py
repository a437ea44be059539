"""The steps of a run in graphs: recorded once, then replayed without Python and without gaps between kernels.

A graph is of one kind of batch (`Step.kind`) under the settings that choose kernels. A model has a few, which are freed
with it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from diffkern.graphs import kept
from diffkern.graphs.calls import are_recorded, unrecorded
from diffkern.graphs.kept import Graphs
from diffkern.graphs.looks import Places, is_pure
from diffkern.graphs.recorder import Recording
from diffkern.samplers.step import Model, Step

FEW = 8  # steps: a shorter run would take longer with its recording than without
# Where the modules are from whose calls do the same whenever they are given the same tensors.
_PURE = ("diffkern.models.", "torch.nn.modules.")

_of_network: weakref.WeakKeyDictionary[nn.Module, Graphs[Places]] = weakref.WeakKeyDictionary()


def check(cuda_graph: bool | str, device: torch.device) -> None:
    """Raise ValueError for a value of `cuda_graph` that there is not, or that asks for what the device cannot do."""
    kept.check_option(cuda_graph)
    if cuda_graph is True and not kept.has_graphs(device):
        raise ValueError(f"cuda_graph=True needs a model on a CUDA device or a CPU, and this one is on {device}")


@contextlib.contextmanager
def start(network: Model, step: Step, steps: int, cuda_graph: bool | str) -> Iterator[Run]:
    """A run of a batch, whose state is its own inside the block only. "auto" takes a graph if the run is long enough
    and the network surely does the same in each step: one of diffkern's, without hooks, and outside of autocast, which
    keeps copies of weights. False frees the network's graphs."""
    graphs = None
    if isinstance(network, nn.Module) and kept.has_graphs(step.x.device):
        if not cuda_graph:
            _of_network.pop(network, None)
        elif cuda_graph is True or (steps >= FEW and are_recorded() and not _casts(step.x.device)):
            graphs = _of_network.setdefault(network, Graphs(network, Places, "sampling", 6))
    # Graphs share their memory, so one run at a time has them. Another, in a thread or a callback, goes without.
    if graphs is None or not graphs.lock.acquire(blocking=False):
        with contextlib.nullcontext() if cuda_graph else unrecorded():
            yield Run(network, step)
        return
    try:
        graphs.look(step.x.device)
        graphs.always = cuda_graph is True
        if cuda_graph is True or is_pure(graphs.network, _PURE):
            with graphs.recorder.in_order(), unrecorded():  # steps are, calls within them need not
                yield _Replay(network, step, graphs)
        else:
            yield Run(network, step)
    finally:
        graphs.lock.release()


def _casts(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


class Run:
    """The steps of a batch, one after the other, as they are."""

    def __init__(self, network: Model, step: Step) -> None:
        self.network, self.step, self.done = network, step, 0

    def __call__(self) -> None:
        """Do the next step. The state after it is in `step`, which may be another from then on."""
        self.step(self.network, first=self.done == 0)
        self.done += 1


@dataclass(eq=False)
class _Graph:
    """Batches of a kind. recordings: of a step that begins where the one before it ended, and of a first one that does
    not; None, where it is not to be had."""

    step: Step
    plain: int = 1  # steps that ran as they are
    recordings: dict[bool, Recording | None] = field(default_factory=dict)


class _Replay(Run):
    """A run by a graph. Where there is none yet the first two steps run as they are, in which kernels are compiled and
    chosen and all is made that is made on first use; the next is recorded."""

    def __init__(self, network: Model, step: Step, graphs: Graphs[Places]) -> None:
        super().__init__(network, step)
        self.graphs = graphs
        self.key = (step.kind(), kept.settings())
        self.graph: _Graph | None = graphs.find(self.key)
        if self.graph is not None:
            self.graph.step.load(step)
            self.step = self.graph.step

    def __call__(self) -> None:
        graph = self.graph
        if graph is None:
            super().__call__()
            self.graph = _Graph(self.step.settled())
            self.step = self.graph.step
            self.graphs.keep(self.key, self.graph)
            return
        begins = self.done == 0 and graph.step.start is not graph.step.model_input
        recording = graph.recordings.get(begins)
        if recording is not None and not recording.hold():
            graph.recordings, graph.plain, recording = {}, 0, None
        if recording is not None:
            recording.replay()
            self.done += 1
        elif begins in graph.recordings or graph.plain < 2:
            super().__call__()
            graph.plain += 1
        else:
            graph.recordings[begins] = recording = self._record(graph.step, begins)
            if recording is None:
                super().__call__()
            else:
                self.done += 1

    def _record(self, step: Step, first: bool) -> Recording | None:
        """The next step, which is done, or is still to do where it cannot be recorded."""
        before = [(t, t.clone()) for t in step.state()]
        recording = self.graphs.record(lambda: step(self.graphs.network, first))
        if recording is None:
            for t, was in before:
                t.copy_(was)
        return recording

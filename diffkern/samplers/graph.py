"""The steps of a run in CUDA graphs: recorded once, then replayed without Python and without gaps between kernels.

A graph is of one kind of batch (`Step.kind`) under the settings that choose kernels. A model has a few, which are freed
with it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffkern.graphs import kept
from diffkern.graphs.kept import Graphs
from diffkern.graphs.looks import Places, is_pure
from diffkern.samplers.step import Model, Step

FEW = 8  # steps: a shorter run would take longer with its recording than without
# Where the modules are from whose calls do the same whenever they are given the same tensors.
_PURE = ("diffkern.models.", "torch.nn.modules.")

_of_network: weakref.WeakKeyDictionary[nn.Module, Graphs[Places]] = weakref.WeakKeyDictionary()


def check(cuda_graph: bool | str, device: torch.device) -> None:
    """Raise ValueError for a value of `cuda_graph` that there is not, or that asks for what the device cannot do."""
    kept.check_option(cuda_graph)
    if cuda_graph is True and not kept.has_graphs(device):
        raise ValueError(f"cuda_graph=True needs a model on a CUDA device, and this one is on {device}")


@contextlib.contextmanager
def start(network: Model, step: Step, steps: int, cuda_graph: bool | str) -> Iterator[Run]:
    """A run of a batch, whose state is its own inside the block only. "auto" takes a graph if the run is long enough
    and the network surely does the same in each step: one of diffkern's, without hooks, and outside of autocast, which
    keeps copies of weights. False frees the network's graphs."""
    graphs = None
    if isinstance(network, nn.Module) and kept.has_graphs(step.x.device):
        if not cuda_graph:
            _of_network.pop(network, None)
        elif cuda_graph is True or (steps >= FEW and not torch.is_autocast_enabled("cuda")):
            graphs = _of_network.setdefault(network, Graphs(network, Places, "sampling", 5))
    # Graphs share their memory, so one run at a time has them. Another, in a thread or a callback, goes without.
    if graphs is None or not graphs.lock.acquire(blocking=False):
        yield Run(network, step)
        return
    try:
        graphs.look(step.x.device)
        if cuda_graph is True or is_pure(graphs.network, _PURE):
            with graphs.recorder.in_order():
                yield _Replay(network, step, steps, graphs)
        else:
            yield Run(network, step)
    finally:
        graphs.lock.release()


class Run:
    """The steps of a batch, one after the other, as they are."""

    def __init__(self, network: Model, step: Step) -> None:
        self.network, self.step, self.done = network, step, 0

    def __call__(self) -> None:
        """Do the next step. The state after it is in `step`, which may be another from then on."""
        self.step(self.network, first=self.done == 0)
        self.done += 1


class _Replay(Run):
    """A run by a graph. Where there is none yet the first two steps run as they are, in which kernels are compiled and
    chosen and all is made that is made on first use; then it is recorded."""

    def __init__(self, network: Model, step: Step, steps: int, graphs: Graphs[Places]) -> None:
        super().__init__(network, step)
        self.graphs, self.steps = graphs, steps
        self.key = (step.kind(), kept.settings())
        self.graph = graphs.find(self.key)
        if self.graph is not None:
            self.graph.step.load(step)
            self.step = self.graph.step

    def __call__(self) -> None:
        if self.graph is not None:
            (self.graph.next if self.done else self.graph.first)()
            self.done += 1
            return
        super().__call__()
        if self.done == min(2, self.steps):
            self.graph = self.graphs.record(self.key, lambda: _record(self.graphs, self.step, self.steps))
            self.step = self.step if self.graph is None else self.graph.step


class _Graph(NamedTuple):
    step: Step
    first: Callable[[], None]
    next: Callable[[], None]
    read: list[Tensor]  # what else it reads, which has to stay


def _record(graphs: Graphs[Places], step: Step, steps: int) -> _Graph:
    """The graph of a batch after two steps, or its only one."""
    fixed, watch = step.settled(), graphs.watch()

    def once(first: bool) -> None:
        with watch:
            fixed(graphs.network, first)

    first = graphs.recorder.record(lambda: once(True)).replay
    # The first step is one like all others if the model's output did not change the layout.
    alike = steps == 1 or fixed.start is fixed.model_input
    after = first if alike else graphs.recorder.record(lambda: once(False)).replay
    return _Graph(fixed, first, after, list(watch.read.values()))

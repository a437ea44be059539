"""The steps of a run in CUDA graphs: recorded once, then replayed without Python and without gaps between kernels.

A graph is of one kind of batch (`Step.kind`) under the settings that choose kernels. It reads weights where they lie,
so that what is changed in place shows: on a GPU no op keeps a packed copy of one. When a weight lies elsewhere, or a
module is another, the model's graphs are given up. A model has a few, which share their memory and are freed with it.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffkern import invariant
from diffkern.op import forced_backend
from diffkern.samplers.recorder import Recorder, Refused, Watch
from diffkern.samplers.step import Model, Step

LIMIT = 8  # graphs of a model, and recordings into one pool of memory
FEW = 8  # steps: a shorter run would take longer with its recording than without
# Where the modules are from whose calls do the same whenever they are given the same tensors.
_PURE = ("diffkern.models.", "torch.nn.modules.")

_of_network: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()


def check(cuda_graph: bool | str, device: torch.device) -> None:
    """Raise ValueError for a value of `cuda_graph` that there is not, or that asks for what the device cannot do."""
    if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
        raise ValueError(f"cuda_graph must be True, False or 'auto', not {cuda_graph!r}")
    if cuda_graph is True and not _has_graphs(device):
        raise ValueError(f"cuda_graph=True needs a model on a CUDA device, and this one is on {device}")


@contextlib.contextmanager
def start(network: Model, step: Step, steps: int, cuda_graph: bool | str) -> Iterator[Run]:
    """A run of a batch, whose state is its own inside the block only. "auto" takes a graph if the run is long enough
    and the network surely does the same in each step: one of diffkern's, without hooks, and outside of autocast, which
    keeps copies of weights. False frees the network's graphs."""
    graphs = None
    if isinstance(network, nn.Module) and _has_graphs(step.x.device):
        if not cuda_graph:
            _of_network.pop(network, None)
        elif cuda_graph is True or (steps >= FEW and not torch.is_autocast_enabled("cuda")):
            graphs = _of_network.setdefault(network, _Graphs(network))
    # Graphs share their memory, so one run at a time has them. Another, in a thread or a callback, goes without.
    if graphs is None or not graphs.lock.acquire(blocking=False):
        yield Run(network, step)
        return
    try:
        graphs.look(step.x.device)
        if cuda_graph is True or graphs.pure:
            with graphs.recorder.in_order():
                yield _Replay(network, step, steps, graphs)
        else:
            yield Run(network, step)
    finally:
        graphs.lock.release()


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


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

    def __init__(self, network: Model, step: Step, steps: int, graphs: _Graphs) -> None:
        super().__init__(network, step)
        self.graphs, self.steps = graphs, steps
        self.key = (step.kind(), _settings())
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
            self.graph = self.graphs.record(self.key, self.step, self.steps)
            self.step = self.step if self.graph is None else self.graph.step


class _Graph(NamedTuple):
    step: Step
    first: Callable[[], None]
    next: Callable[[], None]
    read: list[Tensor]  # what else it reads, which has to stay


class _Graphs:
    """The graphs of one network."""

    recorder: Recorder

    def __init__(self, network: nn.Module) -> None:
        self.of = weakref.ref(network)
        self.lock = threading.Lock()
        self.kept: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # the last used last; None: not to be had
        self.looks: list[Hashable] = []
        self.pure = self.warned = self.hopeless = False
        self.recorded = 0

    @property
    def network(self) -> nn.Module:
        network = self.of()
        assert network is not None
        return network

    def look(self, device: torch.device) -> None:
        """Give up the graphs if the network is not as it was when they were recorded."""
        network = self.network
        looks = [device, torch.is_autocast_enabled("cuda"), *_looks(network)]
        if looks != self.looks:
            self.looks, self.pure, self.recorded = looks, _is_pure(network), 0
            self.warned = self.hopeless = False
            self.kept.clear()
            self.recorder = Recorder(device)

    def find(self, key: Hashable) -> _Graph | None:
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def record(self, key: Hashable, step: Step, steps: int) -> _Graph | None:
        """The graph of a batch after two steps, or its only one; None, after one warning, if it is not to be had."""
        if self.hopeless or key in self.kept:
            return None
        while len(self.kept) >= LIMIT:
            self.kept.popitem(last=False)
        if self.recorded % LIMIT == 0:  # else a pool would grow with each shape that is larger than those before
            self.recorder.new_pool()
        self.recorded += 1
        graph = None
        try:
            graph = self._record(step, steps)
        except Exception as e:
            self.recorded, self.hopeless = 0, not isinstance(e, torch.OutOfMemoryError)
            if not self.warned:
                self.warned = True
                warnings.warn(f"sampling without a CUDA graph: {_reason(e)}", RuntimeWarning, stacklevel=6)
        self.kept[key] = graph
        return graph

    def _record(self, step: Step, steps: int) -> _Graph:
        if torch.is_autocast_enabled("cuda"):
            raise Refused("autocast keeps copies of weights, which a graph would go on reading")
        fixed, watch = step.settled(), Watch(t for t in _tensors(self.network) if _is_plain(t))

        def once(first: bool) -> None:
            with watch:
                fixed(self.network, first)

        first = self.recorder.record(lambda: once(True))
        # The first step is one like all others if the model's output did not change the layout.
        alike = steps == 1 or fixed.start is fixed.model_input
        after = first if alike else self.recorder.record(lambda: once(False))
        return _Graph(fixed, first, after, list(watch.read.values()))


def _settings() -> Hashable:
    """What chooses kernels beside the tensors."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        forced_backend(), invariant.is_on(), torch.are_deterministic_algorithms_enabled(), cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )  # fmt: skip


def _looks(network: nn.Module) -> Iterator[Hashable]:
    """What a graph takes for granted: which modules there are, and where their tensors lie."""
    for module in network.modules():
        yield type(module), module.training, _is_patched(module)
        for t in _tensors(module, recurse=False):
            yield (t.data_ptr(), t.dtype, t.shape, t.stride()) if _is_plain(t) else (id(t), t._version)


def _is_pure(network: nn.Module) -> bool:
    """Whether the network surely does the same whenever it is given the same tensors."""
    modules = network.modules()
    return all(type(m).__module__.startswith(_PURE) and not _is_patched(m) for m in modules) and all(
        _is_plain(t) for t in _tensors(network)
    )


def _is_patched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter)


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


def _reason(e: Exception) -> str:
    if isinstance(e, Refused):
        return str(e)
    if isinstance(e, torch.OutOfMemoryError):
        return "there is not enough memory for it"
    return f"recording it failed with {type(e).__name__}: {str(e).partition(chr(10))[0]}"

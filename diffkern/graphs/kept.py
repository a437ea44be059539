"""The graphs of a network, in CUDA or of the kernels of a CPU: a few, which share their memory.

A graph reads weights where they lie, so that what is changed in place shows: on a GPU no op keeps a packed copy of one,
and on a CPU a graph whose copies are out of date is given up. When a weight lies elsewhere, or the network is another
otherwise, all of its graphs are.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffkern import invariant
from diffkern.backend import forced_backend
from diffkern.graphs import recorder, tape
from diffkern.graphs.looks import is_plain, tensors
from diffkern.graphs.recorder import Recording, Refused, Watch

LIMIT = 8  # graphs of a network, and recordings into one pool of memory


RECORDERS: dict[str, type[recorder.Recorder] | type[tape.Recorder]] = {"cuda": recorder.Recorder, "cpu": tape.Recorder}


def has_graphs(device: torch.device) -> bool:
    return device.type in RECORDERS


def check_option(cuda_graph: bool | str) -> None:
    """Raise ValueError for a value of `cuda_graph` that there is not."""
    if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
        raise ValueError(f"cuda_graph must be True, False or 'auto', not {cuda_graph!r}")


class Looks(Protocol):
    """What a network was like when it was looked at."""

    def hold(self, network: nn.Module) -> bool: ...


L = TypeVar("L", bound=Looks)


class Graphs(Generic[L]):
    """The graphs of one network, by what they were recorded of."""

    recorder: recorder.Recorder | tape.Recorder

    def __init__(self, network: nn.Module, look: Callable[[nn.Module], L], what: str, stacklevel: int) -> None:
        """look: takes down what the graphs take for granted. what: runs without a graph, and stacklevel: how far above
        `record` its caller is, for a warning."""
        self.of = weakref.ref(network)
        self.take_down, self.what, self.stacklevel = look, what, stacklevel
        self.lock = threading.Lock()
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()  # the last used last; None: not to be had
        self.looks: L | None = None
        self.setting: Hashable = None
        self.always = self.warned = self.hopeless = False  # always: a graph was asked for
        self.recorded = 0

    @property
    def network(self) -> nn.Module:
        network = self.of()
        assert network is not None
        return network

    def look(self, device: torch.device) -> bool:
        """Give up the graphs if the network is not as it was when they were recorded. Returns whether it is."""
        network, setting = self.network, (device, torch.is_autocast_enabled(device.type))
        if self.looks is not None and self.setting == setting and self.looks.hold(network):
            return True
        self.looks, self.setting, self.recorded = self.take_down(network), setting, 0
        self.warned = self.hopeless = False
        self.kept.clear()
        self.recorder = RECORDERS[device.type](device)
        return False

    def find(self, key: Hashable) -> Any:
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def is_refused(self, key: Hashable) -> bool:
        """Whether it was tried in vain: to try again would take a call's time."""
        return key in self.kept and self.kept[key] is None

    def keep(self, key: Hashable, graph: Any) -> None:
        while len(self.kept) >= LIMIT and key not in self.kept:
            self.kept.popitem(last=False)
        self.kept[key] = graph

    def record(self, run: Callable[[], Any], given: Sequence[Tensor] = (), draws: bool = True) -> Recording | None:
        """What the recorder makes of `run`, which does that once; None, after one warning, if a recording is not to be
        had. given: what a replay is given others for. draws: whether it may draw random numbers; on a CPU it may."""
        if self.hopeless:
            return None
        if self.recorded % LIMIT == 0:  # else a pool would grow with each shape that is larger than those before
            self.recorder.new_pool()
        self.recorded += 1
        try:
            return self._record(run, given, draws)
        except Exception as e:
            # On a CPU to try again, with other arguments or on another backend, costs no more than a call.
            self.hopeless = not isinstance(e, torch.OutOfMemoryError) and self.recorder.device.type != "cpu"
            self.recorded = 0
            self.warn(reason(e), self.stacklevel + 1)
            return None

    def _record(self, run: Callable[[], Any], given: Sequence[Tensor], draws: bool) -> Recording:
        device = self.recorder.device.type
        if torch.is_autocast_enabled(device):
            raise Refused("autocast keeps copies of weights, which a graph would go on reading")
        weights = [t for t in tensors(self.network) if is_plain(t)]
        watch = Watch((*weights, *given), draws or device == "cpu", is_silent=device == "cpu")

        def watched() -> Any:
            with watch:
                return run()

        recording = self.recorder.record(watched, given, weights)
        return recording if device == "cpu" else recording._replace(read=list(watch.read.values()))

    def warn(self, why: str, stacklevel: int) -> None:
        """Once for a network as it is. On a CPU a graph is nothing to be missed, unless it was asked for."""
        if not self.warned and (self.always or self.recorder.device.type != "cpu"):
            self.warned = True
            warnings.warn(f"{self.what} without a graph: {why}", RuntimeWarning, stacklevel=stacklevel + 1)


def settings() -> Hashable:
    """What chooses kernels beside the tensors."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        forced_backend(), invariant.is_on(), torch.are_deterministic_algorithms_enabled(), cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )  # fmt: skip


def reason(e: Exception) -> str:
    if isinstance(e, Refused):
        return str(e)
    if isinstance(e, torch.OutOfMemoryError):
        return "there is not enough memory for it"
    return f"recording it failed with {type(e).__name__}: {str(e).partition(chr(10))[0]}"

"""The CUDA graphs of a network: a few, which share their memory.

A graph reads weights where they lie, so that what is changed in place shows: on a GPU no op keeps a packed copy of one.
When a weight lies elsewhere, or the network is another otherwise, its graphs are given up.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffkern import invariant
from diffkern.backend import forced_backend
from diffkern.graphs.looks import is_plain, tensors
from diffkern.graphs.recorder import Recorder, Refused, Watch

LIMIT = 8  # graphs of a network, and recordings into one pool of memory


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


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

    recorder: Recorder

    def __init__(self, network: nn.Module, look: Callable[[nn.Module], L], what: str, stacklevel: int) -> None:
        """look: takes down what the graphs take for granted. what: runs without a graph, and stacklevel: how far above
        `record` its caller is, for a warning."""
        self.of = weakref.ref(network)
        self.take_down, self.what, self.stacklevel = look, what, stacklevel
        self.lock = threading.Lock()
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()  # the last used last; None: not to be had
        self.looks: L | None = None
        self.setting: Hashable = None
        self.warned = self.hopeless = False
        self.recorded = 0

    @property
    def network(self) -> nn.Module:
        network = self.of()
        assert network is not None
        return network

    def look(self, device: torch.device) -> bool:
        """Give up the graphs if the network is not as it was when they were recorded. Returns whether it is."""
        network, setting = self.network, (device, torch.is_autocast_enabled("cuda"))
        if self.looks is not None and self.setting == setting and self.looks.hold(network):
            return True
        self.looks, self.setting, self.recorded = self.take_down(network), setting, 0
        self.warned = self.hopeless = False
        self.kept.clear()
        self.recorder = Recorder(device)
        return False

    def find(self, key: Hashable) -> Any:
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def record(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` makes with the recorder, from now on kept under the key; None, after one warning, if it is not to
        be had."""
        if self.hopeless or key in self.kept:
            return None
        while len(self.kept) >= LIMIT:
            self.kept.popitem(last=False)
        if self.recorded % LIMIT == 0:  # else a pool would grow with each shape that is larger than those before
            self.recorder.new_pool()
        self.recorded += 1
        graph = None
        try:
            if torch.is_autocast_enabled("cuda"):
                raise Refused("autocast keeps copies of weights, which a graph would go on reading")
            graph = make()
        except Exception as e:
            self.recorded, self.hopeless = 0, not isinstance(e, torch.OutOfMemoryError)
            self.warn(reason(e), self.stacklevel + 1)
        self.kept[key] = graph
        return graph

    def warn(self, why: str, stacklevel: int) -> None:
        """Once for a network as it is."""
        if not self.warned:
            self.warned = True
            warnings.warn(f"{self.what} without a CUDA graph: {why}", RuntimeWarning, stacklevel=stacklevel + 1)

    def watch(self, more: Iterable[Tensor] = (), random: bool = True) -> Watch:
        """Of what is recorded, with the network's tensors and more known."""
        return Watch((*(t for t in tensors(self.network) if is_plain(t)), *more), random)


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

"""Recording kernels into a CUDA graph, with what PyTorch's own way leaves undone when it does not succeed.

What may not be recorded, such as asking the device for a number, is refused before CUDA sees it: CUDA would end the
recording, and PyTorch 2.11 then goes on as if it were still on, in its allocator and its random numbers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_recording = threading.Lock()


class Refused(RuntimeError):
    """A step does what cannot be recorded. The message says what."""


class Watch(TorchDispatchMode):
    """Refuses what cannot be recorded, and remembers what is read that was not made inside, but for `known` tensors."""

    def __init__(self, known: Iterable[Tensor], random: bool = True, is_silent: bool = False) -> None:
        """random: whether numbers may be drawn; from another generator than the device's they are the same in every
        replay. is_silent: ops are to run as if nobody looked on (diffkern/dispatch.py)."""
        super().__init__()
        self.random, self.is_silent = random, is_silent
        self.known = {memory(t) for t in known}
        self.read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not _WAITS.isdisjoint(getattr(func, "tags", ())):
            raise Refused(f"the model asks the device for a number ({func})")
        if func in _COPIES and len({d.type for d in (kwargs.get("device"), *(t.device for t in given)) if d}) > 1:
            raise Refused(f"the model copies between the host and the device ({func})")
        if not self.random and _draws(func, args, kwargs):
            raise Refused(f"the model draws random numbers ({func})")
        for t in given:
            place = memory(t)
            if place not in self.known:
                self.read.setdefault(place, t)
        made = func(*args, **kwargs)
        self.known.update(memory(t) for t in tree_leaves(made) if isinstance(t, Tensor))
        return made


_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers. Attention may, and does not without dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    names = [a.name for a in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, args, strict=False)) | kwargs
    return float(given.get("dropout_p", 0.0)) > 0


class Recording(NamedTuple):
    """replay(given): does again what was recorded, with these in place of the tensors that it was given, and returns
    what that makes, in new tensors. made: the same of the recorded run. hold(): whether a replay would still do what a
    run does. read: what it reads beside weights, and has to stay."""

    replay: Callable[..., Any]
    made: Any
    hold: Callable[[], bool] = lambda: True
    read: Sequence[Tensor] = ()


class Recorder:
    """Records what is run on a device, into a pool of its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, torch.cuda.Event()

    def new_pool(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """What the block does comes after what such a block did before, in another stream too."""
        torch.cuda.current_stream(self.device).wait_event(self.last)
        try:
            yield
        finally:
            self.last.record(torch.cuda.current_stream(self.device))

    def record(self, run: Callable[[], Any], given: Sequence[Tensor] = (), weights: Iterable[Tensor] = ()) -> Recording:
        """run, to be replayed again and again, and its first replay: recorded kernels do not run. given: what it reads
        that a replay is given others for. weights: of the network, which are not held."""
        graph = torch.cuda.CUDAGraph()
        with _recording, torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what is free here cannot be had inside
            with _own_workspaces(), torch.cuda.stream(torch.cuda.Stream()):
                # Other threads may allocate meanwhile.
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    made = run()
                except BaseException:
                    self._abandon(graph)
                    raise
                graph.capture_end()

        def replay(others: Sequence[Tensor] = given) -> Any:
            for own, t in zip(given, others, strict=True):
                if own is not t:
                    _written(own).copy_(_written(t))
            graph.replay()
            return tree_map(lambda t: copied(t) if isinstance(t, Tensor) else t, made)

        return Recording(replay, replay())

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:  # CUDA has ended it, and PyTorch 2.11 then leaves its own part undone
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            # A recording that succeeds takes the random numbers, too, out of the state that they were left in.
            other = torch.cuda.CUDAGraph()
            other.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)
            other.capture_end()


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Inside cuBLAS takes new workspaces, of a graph's own memory: those that there were could be freed, or written by
    products of another stream, while a graph still used them."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def copied(t: Tensor) -> Tensor:
    """A copy of the same strides."""
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    _written(made).copy_(_written(t))
    return made


def _written(t: Tensor) -> Tensor:
    """The part of a tensor to write for all of it to be written: one entry of a dimension that repeats it."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def memory(t: Tensor) -> int:
    """What tells one tensor's memory from another's."""
    if t.layout is not torch.strided:  # oneDNN's own show nothing
        return id(t)
    return t.untyped_storage().data_ptr() or id(t)  # of no element there is none

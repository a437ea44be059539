"""Timing on a GPU: calls as they follow one another in a sampling loop that is a CUDA graph, without the gaps between
launches, on inputs and outputs that change from call to call, so that the L2 cache does not serve them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffkern.bench import record

Call = Callable[[], Any]
Bind = Callable[..., Call]
"""Called once with arguments, gives the call on them."""

CALLS, SETS = 64, 64  # of a graph at most; inputs of less than a 64th of the cache stay in it, as they do in a network
GRAPH, MEASUREMENT = 400e-6, 1.5e-3  # seconds that a graph, and a measurement, take at least
SLEEP = 1_000_000  # cycles: half a millisecond, in which the host runs ahead


def settings(timed: bool = True) -> None:
    """What a careful user has set: cuDNN tries its kernels, where they are timed. Float32 is float32 in convolutions as
    well, since it says what error a kernel may make."""
    torch.backends.cudnn.benchmark = timed
    torch.backends.cudnn.allow_tf32 = False


def ceilings() -> dict[str, float]:
    """What the device can do, measured now: GB/s of a copy of 1 GiB, read and written, and TFLOP/s of a bfloat16 matrix
    product of 8192 x 8192 x 8192 random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target, product = torch.empty_like(source), torch.empty_like(a)
    copy = _median(lambda: target.copy_(source))
    matmul = _median(lambda: torch.mm(a, b, out=product))
    return {"GB/s": float(f"{2 * source.numel() / copy / 1e9:.4g}"),
            "TFLOP/s": float(f"{2 * 8192**3 / matmul / 1e12:.4g}")}  # fmt: skip


def _median(call: Call, times: int = 15) -> float:
    for _ in range(5):
        call()
    return record.spread([_seconds(call, 1) for _ in range(times)])["median"]


def _seconds(call: Call, repeat: int) -> float:
    """Seconds that the device takes, by its own clock, for what `call` gives it to do."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP)
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def again(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments in other memory. Views of one tensor are views of one copy of it."""
    copies: dict[int, Any] = {}

    def copied(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        storage = a.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = storage.clone()
        empty = torch.empty(0, dtype=a.dtype, device=a.device)
        return empty.set_(copies[storage.data_ptr()], a.storage_offset(), a.size(), a.stride())  # type: ignore[call-overload]

    return tuple(map(copied, args))


def sets_of(args: tuple[Any, ...], moved: int) -> list[tuple[Any, ...]]:
    """As many copies of the arguments of a call that moves so many bytes as no cache holds."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = -(-5 * cache // (2 * max(moved, 1)))
    return [args, *(again(args) for _ in range(min(SETS, max(2, wanted)) - 1))]


class Replay:
    """A CUDA graph of calls on different inputs, with different outputs, `results`: of so many calls as take GRAPH
    seconds, unless their number is given. Raises RuntimeError if a call cannot be captured, such as one that waits for
    the device."""

    def __init__(self, bind: Bind, sets: list[tuple[Any, ...]], calls: int = 0) -> None:
        self.stream = torch.cuda.Stream()  # autograd runs on the stream that it was recorded on: bound there as well
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.eager = [bind(*args) for args in sets]
            for call in self.eager:  # compiles, packs, tries kernels: nothing of it may happen in a graph
                call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.eager[0]()
            torch.cuda.synchronize()
            once = time.perf_counter() - start
            self.calls = calls or max(len(sets), min(CALLS, int(GRAPH / once)))
            self.graph = torch.cuda.CUDAGraph()
            # Within the stream's own block, which is left also when a capture fails.
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.results = [self.eager[i % len(sets)]() for i in range(self.calls)]
        torch.cuda.current_stream().wait_stream(self.stream)
        self.repeat = 1
        self.repeat = max(1, min(20, int(MEASUREMENT / (self.seconds() * self.calls))))

    def seconds(self) -> float:
        """Of a call, in one measurement."""
        return _seconds(self.graph.replay, self.repeat) / (self.repeat * self.calls)

    def launched(self) -> float:
        """Seconds of a call without a graph, by the host's clock: what Python and the launches take shows."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in self.eager:
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(self.eager)


def interleave(
    binds: Mapping[str, Bind], sets: list[tuple[Any, ...]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Seconds a call of each, in each round; the same for one call without a graph, the median; and why some cannot be
    timed. Every round runs all in turn, so that a device that slows down slows them all."""
    replays: dict[str, Replay] = {}
    refused: dict[str, str] = {}
    for name, bind in binds.items():
        try:
            replays[name] = Replay(bind, sets)
        except (RuntimeError, NotImplementedError) as error:
            if "CUDA error: an illegal" in str(error):  # nothing runs in this process any more
                raise
            refused[name] = str(error).strip().splitlines()[0]
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            seconds[name].append(replay.seconds())
    launched = {name: record.spread([r.launched() for _ in range(5)])["median"] for name, r in replays.items()}
    return seconds, launched, refused

"""Recording what a network runs on a CPU: kernels, their order, and what they are given. A replay calls them again,
without the Python that chose them, and gets the same bits.

A kernel here is whatever PyTorch's dispatcher is asked for. What a kernel makes is made anew by each replay, and freed
behind the last kernel that reads it, as before. What was there before the recording is read where it lies, so that what
is changed in place shows; of packed weights (diffkern/packing.py) it is asked before each replay whether they still are
those of the weights.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from diffkern import packing
from diffkern.graphs.recorder import Recording, Refused, copied, memory

_aten = torch.ops.aten
# What Python makes of the numbers of a tensor without asking the dispatcher.
_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


class _Call(NamedTuple):
    """Numbers are of values: constants, and what calls before made."""

    call: Callable[..., Any]
    given: list[int]
    to: list[int]  # what it makes
    many: bool  # whether that is a sequence


class Recorder:
    """Records what is run on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_pool(self) -> None:
        """Memory is not the recordings' own here."""

    def in_order(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, run: Callable[[], Any], given: Sequence[Tensor] = (), weights: Iterable[Tensor] = ()) -> Recording:
        """Run, and take down what runs. given: what a replay is given others for. weights: of the network. Neither they
        nor their packed copies are held: a recording ends with the first that is gone."""
        tape = Tape(given, weights)
        with tape.packed, _Reads(), tape:
            made = run()
        replay = _Replay(tape, made)
        return Recording(replay, made, replay.hold)


class _Replay:
    """Calls again what a tape has taken down."""

    def __init__(self, tape: Tape, made: Any) -> None:
        leaves, self.spec = tree_flatten(made)
        self.results = [tape.result(leaf) for leaf in leaves]
        self.lines, self.packed = _lines(tape, self.results), tape.packed
        self.values: list[Any] | None = tape.values
        self.weights = [(number, weakref.ref(tape.values[number], self._end)) for number in tape.weights]
        for number in tape.weights:
            tape.values[number] = None

    def _end(self, gone: Any) -> None:
        self.values, self.lines = None, []

    def hold(self) -> bool:
        return self.values is not None and self.packed.hold()

    def __call__(self, given: Sequence[Tensor] = ()) -> Any:
        assert self.values is not None
        now = self.values.copy()
        now[: len(given)] = given
        for number, weight in self.weights:
            now[number] = weight()
        for call, take, to, many, done in self.lines:
            made = call(*take(now))
            if many:
                for number, t in zip(to, made, strict=True):
                    now[number] = t
            elif to:
                now[to[0]] = made
            for number in done:
                now[number] = None
        return tree_unflatten([now[number] for number in self.results], self.spec)


class Tape(TorchDispatchMode):
    """Takes down all calls of the dispatcher in its block."""

    is_silent = True

    def __init__(self, given: Sequence[Tensor], weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.ids, self.packed = {id(t) for t in weights}, packing.Noted()
        self.weights: list[int] = []  # the numbers of those that are read, and of packed ones
        self.calls: list[_Call] = []
        self.values: list[Any] = []
        self.numbers: Any = WeakIdKeyDictionary()  # of tensors: what is freed meanwhile may leave its place to another
        self.fixed: set[int] = set()  # the numbers of constants
        self.before = {memory(t) for t in given}  # where lies what no call makes
        self.changing: Counter[int] = Counter()  # and what each replay has another of
        for t in given:
            self._made(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        many = isinstance(made, (list, tuple))
        results = list(made) if many else [] if made is None else [made]
        if not all(isinstance(t, Tensor) for t in results):
            if not any(isinstance(a, Tensor) for a in tree_leaves((args, kwargs))):
                return made  # as of two dtypes
            raise Refused(f"the model asks for a number ({func})")
        if func is _aten.lift_fresh.default:  # of Python's numbers, in a tensor that may be written to
            self.calls.append(_Call(torch.clone, [self._constant(made.clone())], [self._made(made)], many))
            return made
        numbers = [self._number(a) for a in (*args, *kwargs.values())]
        call: Callable[..., Any] = _Named(func, len(args), tuple(kwargs)) if kwargs else func
        if results and _is_view(func) and self.fixed.issuperset(numbers) and not set(self.weights) & set(numbers):
            for t in results:
                self._constant(t)
        else:
            to = [self.numbers[t] if t in self.numbers else self._made(t) for t in results]
            self.calls.append(_Call(call, numbers, to, many))
        return made

    def result(self, leaf: Any) -> int:
        """The number of what the run returns, in memory of its own."""
        number = self._number(leaf)
        if not isinstance(leaf, Tensor) or memory(leaf) not in self.before:
            return number
        copy = self._new(None)
        self.calls.append(_Call(copied, [number], [copy], False))
        return copy

    def _number(self, value: Any) -> int:
        if isinstance(value, Tensor):
            return self.numbers[value] if value in self.numbers else self._constant(value)
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            parts, number = [self._number(v) for v in value], self._new(None)
            self.calls.append(_Call(_listed, parts, [number], False))
            return number
        number = self._new(value)
        self.fixed.add(number)
        return number

    def _constant(self, t: Tensor) -> int:
        if self.changing[memory(t)]:
            raise Refused("the model makes a tensor in a way that a recording does not see")
        number = self.numbers[t] = self._new(t)
        self.fixed.add(number)
        self.before.add(memory(t))
        if id(t) in self.ids or id(t) in self.packed.ids:
            self.weights.append(number)
        return number

    def _made(self, t: Tensor) -> int:
        number, place = self._new(None), memory(t)
        self.numbers[t] = number
        self.changing[place] += 1
        weakref.finalize(t, self.changing.subtract, (place,)).atexit = False
        return number

    def _new(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1


class _Named:
    """A call with its last arguments by name."""

    def __init__(self, func: Any, count: int, names: tuple[str, ...]) -> None:
        self.func, self.count, self.names = func, count, names

    def __call__(self, *args: Any) -> Any:
        return self.func(*args[: self.count], **dict(zip(self.names, args[self.count :], strict=True)))


class _Reads(TorchFunctionMode):
    """Refuses what a tape would not see."""

    is_silent = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise Refused(f"the model reads a tensor's numbers ({func.__name__})")
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _listed(*values: Any) -> list[Any]:
    return list(values)


def _taking(numbers: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if not numbers:
        return lambda values: ()
    if len(numbers) == 1:
        only = numbers[0]
        return lambda values: (values[only],)
    return itemgetter(*numbers)


_Line = tuple[Callable[..., Any], Callable[[list[Any]], tuple[Any, ...]], list[int], bool, list[int]]


def _lines(tape: Tape, results: list[int]) -> list[_Line]:
    """The calls as they are replayed: what is called, its arguments, of all values, and where what it makes goes; and
    behind it, what nobody reads any more."""
    last: dict[int, int] = {}
    for i, call in enumerate(tape.calls):
        last.update(dict.fromkeys((*call.given, *call.to), i))
    done: list[list[int]] = [[] for _ in tape.calls]
    for number in last.keys() - tape.fixed - set(results):
        done[last[number]].append(number)
    return [(c.call, _taking(c.given), c.to, c.many, d) for c, d in zip(tape.calls, done, strict=True)]

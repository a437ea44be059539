"""Scores sets of pictures by several methods, a few pictures at a time, so that it can be stopped and go on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern.claims import Claims
from diffkern.data import Pictures
from diffkern.identity import hash_tensors
from diffkern.likelihood.ode import ode_log_likelihood
from diffkern.likelihood.parts import Part, Parts
from diffkern.likelihood.record import Entry, Record
from diffkern.likelihood.result import Likelihood
from diffkern.likelihood.vdm import vdm
from diffkern.likelihood.vlb import vlb
from diffkern.models.bundle import Diffusion
from diffkern.progress import progress_bar
from diffkern.ranks import join


@dataclass(frozen=True)
class Settings:
    """What the figures depend on beside model and pictures. terms: None for every timestep. tolerance: of "dopri5".
    steps: of the other solvers."""

    seed: int = 0
    repeats: int = 1
    terms: int | None = None
    variance: str = "fixed_small"
    solver: str = "dopri5"
    steps: int = 20
    tolerance: float = 1e-3
    divergence: str = "hutchinson"
    dequantization: str = "uniform"


def _points(settings: Settings, T: int) -> int:
    """As many noise levels for vdm as for vlb."""
    return settings.terms or max(3, T - 1)


def _fixed(settings: Settings) -> str:
    """The variance of vdm's decoder, which no model learns."""
    return "fixed_small" if settings.variance == "learned_range" else settings.variance


def _runs(settings: Settings) -> int:
    """How often the ode is followed: one run could not tell the error of a picture's figure."""
    return max(2, settings.repeats)


class Method(NamedTuple):
    """score: the function. figure: what it gives. options: its own arguments, for a schedule of T timesteps.
    evaluations: how often it will ask the model, for a picture, as far as that is known beforehand. sequential: whether
    one after the other."""

    score: Callable[..., Likelihood]
    figure: str
    options: Callable[[Settings, int], dict[str, Any]]
    evaluations: Callable[[Settings, int], int]
    sequential: bool = False


METHODS = {
    "vlb": Method(
        vlb,
        "upper bound",
        lambda s, T: {"terms": s.terms, "variance": s.variance, "draws": s.repeats},
        lambda s, T: s.repeats * (s.terms or T - 1) + max(2, s.repeats),
    ),
    "vdm": Method(
        vdm,
        "upper bound",
        lambda s, T: {"points": _points(s, T), "variance": _fixed(s), "draws": s.repeats},
        lambda s, T: s.repeats * _points(s, T) + max(2, s.repeats),
    ),
    "ode": Method(
        ode_log_likelihood,
        "estimate",
        lambda s, T: {
            "solver": s.solver, "steps": s.steps, "rtol": s.tolerance, "atol": s.tolerance,
            "divergence": s.divergence, "dequantization": s.dequantization, "repeats": _runs(s),
        },
        lambda s, T: (
            _runs(s) * {"dopri5": 60, "heun": 2 * s.steps, "rk4": 4 * s.steps}[s.solver]
            * (2 if s.divergence == "difference" else 1)
        ),
        sequential=True,
    ),
}  # fmt: skip
BATCHES = 8  # of a bound between two looks at the file


def identity(diffusion: Diffusion) -> str:
    """What tells this model from others: a SHA-256 of its weights and its schedule."""
    s = diffusion.schedule
    found = hashlib.sha256(repr((s.prediction, s.path, s.clip, s.sigma_data)).encode())
    state = sorted(diffusion.model.state_dict().items())
    return hash_tensors([("alpha_t", s.alpha_t), ("sigma_t", s.sigma_t), *state], found).hexdigest()


def run(
    diffusion: Diffusion,
    sets: Sequence[Pictures],
    labels: Mapping[str, Tensor | None],
    methods: Sequence[str],
    settings: Settings,
    record: Record,
    *,
    batch_size: int = 64,
    progress: bool | None = None,
    pause: Callable[[], None] = lambda: None,
) -> None:
    """Score what the record lacks of these sets and methods, and write it after every few pictures.

    sets: of distinct names. labels: int64 [n] or None, by the name of the set. methods: of METHODS. batch_size: model
    evaluations at a time. progress: as for `diffkern.sample`. pause: called before every few pictures, and while this
    process waits for others; raises whatever ends the run there. Under torchrun, where it is called in every process,
    they share the pictures out among themselves; the record of the first is filled and written, those of the others
    need no entries. The figures are the same to the bit whether it was stopped on the way or not. Raises ValueError if
    one is not finite, KeyboardInterrupt if it is stopped, and ConnectionError if the store of torchrun is lost, both
    with a sentence that says what is kept."""
    by_name = {pictures.name: pictures for pictures in sets}
    T = len(diffusion.schedule)

    def weight(entry: Entry) -> int:
        """Of one picture, in evaluations without a backward pass."""
        return METHODS[entry.method].evaluations(settings, T) * _cost(entry, settings)

    left = [e for e in record.entries if e.data in by_name and e.method in methods and not e.complete]
    total = sum(weight(entry) * (entry.pictures - entry.done) for entry in left)
    style = "{desc}{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    try:
        with join(pause) as ranks:
            parts = Parts(ranks, record, _todo(left, settings, T, batch_size), pause)
            shown = False if ranks.rank else progress
            with progress_bar(shown, total=total, bar_format=style) as bar:

                def gather() -> None:
                    parts.gather()
                    done = total - sum(weight(entry) * (entry.pictures - entry.done) for entry in left)
                    bar.update(max(0, done - bar.n))

                def wait() -> None:
                    gather()
                    pause()

                claims = Claims(ranks.store, [part.name for part in parts.todo], idle=wait)
                for i in claims:
                    wait()
                    part = parts.todo[i]
                    bar.set_description(f"{part.data}, {part.method}", refresh=False)
                    entry = Entry(part.data, part.method, len(part.pictures))
                    where = by_name[part.data], labels[part.data], part.pictures
                    _score(diffusion, *where, settings, entry, batch_size, bar, weight(entry), claims)
                    parts.put(part, entry)
                    claims.done(i)
                gather()
        if left:
            record.save()
    except (KeyboardInterrupt, ConnectionError) as e:
        if any(entry.done for entry in record.entries):
            record.save()
            kept = f"what is done is kept in {record.path}: the same command goes on from there"
            e.args = (f"{e}; {kept}" if str(e) else kept,)
        raise


def _todo(left: Sequence[Entry], settings: Settings, T: int, batch_size: int) -> list[Part]:
    """The pictures that the entries lack, a few at a time."""
    parts = []
    for entry in left:
        method = METHODS[entry.method]
        at_once = BATCHES * batch_size // method.evaluations(settings, T)
        if method.sequential:
            at_once = batch_size // _runs(settings)
        for start in range(entry.done, entry.pictures, max(1, at_once)):
            parts.append(Part(entry.data, entry.method, start, min(start + max(1, at_once), entry.pictures)))
    return parts


def _score(
    diffusion: Diffusion, pictures: Pictures, labels: Tensor | None, part: range, settings: Settings, entry: Entry,
    batch_size: int, bar: Any, weight: int, claims: Claims,
) -> None:  # fmt: skip
    """Add a part of the pictures to an entry."""
    method = METHODS[entry.method]
    cost = _cost(entry, settings)
    end = bar.n + weight * len(part)
    evaluations, start = 0, time.perf_counter()

    def count(samples: int) -> None:
        nonlocal evaluations
        evaluations += samples
        bar.update(min(cost * samples, end - bar.n))
        claims.is_wanted()

    where = slice(part.start, part.stop)
    T = len(diffusion.schedule)
    dtype = str(next(diffusion.model.parameters()).dtype).removeprefix("torch.")
    try:
        with _counted(diffusion, count):
            found = method.score(
                diffusion,
                pictures.images[where],
                labels=None if labels is None else labels[where],
                seed=settings.seed,
                sample_ids=part,
                batch_size=batch_size,
                progress=False,
                **method.options(settings, T),
            )
        finite = bool(torch.isfinite(found.log_p).all())
    except ArithmeticError:
        finite = False
    if not finite:
        hint = "" if dtype == "float32" else ": try --dtype float32"
        raise ValueError(f"{entry.method} gave numbers of {entry.data} that are not finite in {dtype}{hint}")
    bar.update(end - bar.n)
    entry.add(found, time.perf_counter() - start, evaluations)


def _cost(entry: Entry, settings: Settings) -> int:
    """What an evaluation of the model takes, with its backward pass if it has one, for the time that is left."""
    return 3 if entry.method == "ode" and settings.divergence != "difference" else 1


@contextmanager
def _counted(diffusion: Diffusion, count: Callable[[int], None]) -> Iterator[None]:
    """Inside the block every call of the model is counted, in samples."""
    hook = diffusion.model.register_forward_pre_hook(lambda _, inputs: count(len(inputs[0])))
    try:
        yield
    finally:
        hook.remove()


def settings_of(diffusion: Diffusion, settings: Settings, backend: str) -> dict[str, Any]:
    """All that the figures of a run depend on but the pictures, as a record keeps it."""
    first = next(diffusion.model.parameters())
    where = {"dtype": str(first.dtype).removeprefix("torch."), "device": first.device.type, "backend": backend}
    return {"model": identity(diffusion), **where, **asdict(settings)}

"""Why a call takes the backend that it takes: `explain`."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffkern.available import availability
from diffkern.backend import forced_backend
from diffkern.op import OPS, Op


class Choice(NamedTuple):
    """One line of `explain`: a backend, whether the op would take it, and the reason."""

    backend: str
    chosen: bool
    reason: str


def explain(what: Op | str, *args: Any, **kwargs: Any) -> list[Choice]:
    """For each backend of an op, in order of preference: would this call take it, and why (not).

    Without arguments the answer is about the machine only. Raises KeyError for an unknown op name."""
    if isinstance(what, str):
        if what not in OPS:
            raise KeyError(f"no op is named {what!r}: choose one of {', '.join(sorted(OPS))}")
        what = OPS[what]
    bound = what.bind(*args, **kwargs) if args or kwargs else None
    forced = forced_backend()
    choices: list[Choice] = []
    taken, best = False, "first that can run"
    for b in what.all_backends():
        reason = availability(b.name) if bound is None else b.why_not(bound)
        if reason is None and forced not in (None, b.name):
            reason = f"can run, but {forced!r} is forced"
        elif reason is None and taken:
            reason = f"can run, but {next(c.backend for c in choices if c.chosen)!r} comes first"
        elif reason is None and forced is None and bound is not None and (better := b.why_defer(bound)):
            reason, best = f"can run, but leaves it to the next: {better}", "next that can run"
        chosen = reason is None
        taken = taken or chosen
        choices.append(Choice(b.name, chosen, reason or ("forced" if forced else best)))
    return choices

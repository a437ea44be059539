"""What `accelerate` did to a model or a pipeline, and what it left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """Modules of one class that run in ops now."""

    name: str
    count: int
    ops: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """Modules of one class that run as before. missed: whether diffkern could be expected to do better."""

    name: str
    count: int
    reason: str
    missed: bool


@dataclass(frozen=True)
class Graphed:
    """Networks of one class, and whether their calls are recorded in CUDA graphs, or why not."""

    name: str
    count: int
    how: str


@dataclass(frozen=True)
class Report:
    """What was replaced and what was not, and why; and of which networks calls are recorded. Prints as a table."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    graphs: tuple[Graphed, ...] = ()

    @classmethod
    def of(
        cls, replaced: Counter[tuple[str, tuple[str, ...]]], left: Counter[tuple[str, str, bool]],
        graphs: Counter[tuple[str, str]],
    ) -> Report:  # fmt: skip
        """Of classes counted, by what else is said of them."""
        return cls(
            tuple(Replaced(name, n, ops) for (name, ops), n in sorted(replaced.items())),
            tuple(Left(name, n, reason, missed) for (name, reason, missed), n in sorted(left.items())),
            tuple(Graphed(name, n, how) for (name, how), n in sorted(graphs.items())),
        )

    @property
    def missed(self) -> tuple[Left, ...]:
        """What `strict=True` refuses to leave."""
        return tuple(entry for entry in self.left if entry.missed)

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """{"replaced": [{"name", "count", "ops"}], "left": [{"name", "count", "reason", "missed"}],
        "graphs": [{"name", "count", "how"}]}."""
        return {
            "replaced": [{**asdict(entry), "ops": list(entry.ops)} for entry in self.replaced],
            "left": [asdict(entry) for entry in self.left],
            "graphs": [asdict(entry) for entry in self.graphs],
        }

    def __str__(self) -> str:
        rows = [(entry.name, str(entry.count), ", ".join(entry.ops)) for entry in self.replaced]
        rows += [(entry.name, str(entry.count), f"left: {entry.reason}") for entry in self.left]
        rows += [(entry.name, str(entry.count), entry.how) for entry in self.graphs]
        if not rows:
            return "nothing to replace"
        head = ("class", "count", "runs as")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {n:>{widths[1]}}  {how}" for name, n, how in (head, *rows))

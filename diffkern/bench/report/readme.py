"""The parts of a README that records write, and docs/figures.md beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffkern.bench.report import pictures, sections
from diffkern.bench.report.records import Record

COMMAND = "diffkern bench report --readme README.md"
BEGIN, END = f"<!-- {{}}: {COMMAND} -->\n", "<!-- end of {} -->\n"
FIGURES = "figures.md"


def regions(text: str, name: str, records: list[Record]) -> str:
    """The text of a README with its regions as they should be. name: of the file. Raises ValueError if a region is not
    in it exactly once."""
    for region in sections.README:
        begin, end = BEGIN.format(region), END.format(region)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed) or begin in rest or end in before + after:
            raise ValueError(f"{name} must have one line {begin.strip()!r} and below it one {end.strip()!r}")
        text = before + begin + sections.summary(region, records) + end + after
    return text


def figures(records: list[Record], drawn: Iterable[str]) -> str:
    """figures.md. drawn: the files of the pictures beside it."""
    shown = [f"![{pictures.alt(p)}]({p.FILE})\n\n{p.ABOUT}" for p in pictures.PICTURES if p.FILE in drawn]
    parts = ["# Figures", "Written by `diffkern bench report` from records of benchmarks.", *shown]
    return "\n\n".join([*parts, sections.details(records)])


def files_of(readme: Path, records: list[Record]) -> dict[Path, bytes]:
    """What there is to write: the README, and in docs/ beside it figures.md and the pictures. A picture that shows
    these records already stays as it is. Raises ValueError, also for a README that is none."""
    docs = readme.parent / "docs"
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {readme}: {getattr(e, 'strerror', '') or e}") from None
    drawn = pictures.draw(records, kept=docs)
    return {
        readme: regions(text, readme.name, records).encode(),
        docs / FIGURES: figures(records, drawn).encode(),
        **{docs / name: png for name, png in drawn.items()},
    }

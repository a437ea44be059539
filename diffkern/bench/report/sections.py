"""The parts of a report. To add one, write a module like those here, and list it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from diffkern.bench.report import (
    accelerated,
    bounds,
    cold_start,
    curves,
    datasets,
    likelihood,
    losses,
    networks,
    ops,
    provenance,
    schedulers,
)
from diffkern.bench.report.records import Record, foremost, load, named


class Section(Protocol):
    """A module that makes Markdown of the records whose files are named like NAME, say "ops-*"."""

    NAME: str

    def details(self, records: list[Record]) -> str:
        """For docs/figures.md and the page, of those records alone, of one machine or more: everything, under a heading
        of the second order; "" if there is nothing to say. The page knows headings, paragraphs, tables and `code`."""


class Summarised(Section, Protocol):
    """A section that a README has something of."""

    def summary(self, records: list[Record]) -> str:
        """Of the same records, what a README has room for: a short table a machine, without headings."""


SECTIONS: tuple[Section, ...] = (
    networks, accelerated, cold_start, datasets, losses, ops, curves, schedulers, likelihood, bounds, provenance,
)  # fmt: skip
"""In the order of docs/figures.md."""

README: dict[str, Summarised] = {"likelihoods": likelihood, "figures": networks, "losses": losses}
"""The regions of the README that are written here, and whose summaries they are."""


def checked(folder: Path) -> list[Record]:
    """The records in a folder. Raises ValueError for one that no report can be made of."""
    records = load(folder)
    for record in records:
        try:
            for section in SECTIONS:
                if found := named([record], section.NAME):
                    section.details(found)
        except KeyError as e:
            raise ValueError(f"{folder / record['file']} is not a record that can be reported: it lacks {e}") from None
        except (TypeError, ValueError, AttributeError, IndexError) as e:
            raise ValueError(f"{folder / record['file']} is not a record that can be reported: {e}") from None
    return records


def summary(region: str, records: list[Record]) -> str:
    """What a region of the README says."""
    section = README[region]
    found = named(foremost(records), section.NAME)
    return (section.summary(found) if found else "") + "\n"


def details(records: list[Record]) -> str:
    """docs/figures.md, from the first heading of the second order on."""
    parts = (section.details(found) for section in SECTIONS if (found := named(records, section.NAME)))
    return "\n\n".join(filter(None, parts)) + "\n"

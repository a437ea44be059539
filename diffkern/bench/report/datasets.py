"""What a long job costs: many processes against one, and many pictures against few."""

from __future__ import annotations

from diffkern.bench.report.records import Record, digits, spread, table, where

NAME = "dataset"


def _sentence(record: Record) -> str:
    r = record["results"]
    one, many = r["jobs"]
    share, growth = r["efficiency"], r["growth"]
    each = [row["ms_per_picture"]["median"] for row in growth]
    peaks = [row["peak_mb"] for row in growth]
    return (
        f"{where(record['machine'])}, one thread a process. A dataset of {r['n']} pictures of {r['model']} in "
        f"{r['steps']} steps: {one['processes']} process draws {spread(one['pictures_per_second'])} pictures a second, "
        f"{many['processes']} draw {spread(many['pictures_per_second'])}: each {100 * share['median']:.0f} % "
        f"({100 * share['p20']:.0f} to {100 * share['p80']:.0f} %) as fast as one alone. From {growth[0]['n']} to "
        f"{growth[-1]['n']} pictures one takes {digits(min(each))} to {digits(max(each))} ms of one process, whose "
        f"peak memory is {digits(min(peaks))} to {digits(max(peaks))} MB."
    )


def details(records: list[Record]) -> str:
    """What there is to say of each machine, and how one process fares as n grows."""
    return "\n\n".join(["## Datasets", *map(_details, records)])


def _details(record: Record) -> str:
    rows = [
        [str(row["n"]), spread(row["ms_per_picture"]), digits(row["peak_mb"])] for row in record["results"]["growth"]
    ]
    return f"{_sentence(record)}\n\n{table(['pictures', 'ms a picture (p20 to p80)', 'peak memory, MB'], rows)}"

"""What a long job costs: many processes against one, many pictures against few, and the end against the beginning."""

from __future__ import annotations

from diffkern.bench.report.records import Record, digits, spread, table, where

NAME = "dataset*"


def _sentence(record: Record) -> str:
    return _whole(record) if "whole" in record["results"] else _growth(record)


def _whole(record: Record) -> str:
    r = record["results"]
    rates, before, after = r["pictures_per_second_by_tenth"], r["peak_mb_before"], r["peak_mb"]
    return (
        f"{where(record['machine'])}, one thread a process. A whole job, {r['whole']} pictures of {r['model']} in "
        f"{r['steps']} steps by {r['processes']} processes, takes {r['seconds'] / 60:.1f} minutes: {digits(rates[0])} "
        f"pictures a second in its first tenth, {digits(rates[-1])} in its last, {digits(min(rates))} to "
        f"{digits(max(rates))} in all of them. The most memory that a process took is {digits(max(before))} MB before "
        f"the first picture of the job, {digits(max(after))} MB after the last."
    )


def _growth(record: Record) -> str:
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
    if "whole" in record["results"]:
        return _sentence(record)
    rows = [
        [str(row["n"]), spread(row["ms_per_picture"]), digits(row["peak_mb"])] for row in record["results"]["growth"]
    ]
    return f"{_sentence(record)}\n\n{table(['pictures', 'ms a picture (p20 to p80)', 'peak memory, MB'], rows)}"

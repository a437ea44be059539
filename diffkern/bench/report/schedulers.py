"""Fused schedulers against diffusers' own, without a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffkern.bench.report.records import Record, Standing, table, times, where

NAME = "schedulers"


def _work(row: dict[str, Any]) -> list[str]:
    return [row["scheduler"].removesuffix("Scheduler"), " x ".join(map(str, row["sample"])), row["dtype"]]


def _us(us: dict[str, float]) -> str:
    return f"{us['median']:.0f} ({us['p20']:.0f} to {us['p80']:.0f})"


def standings(records: Iterable[Record]) -> list[Standing]:
    """Every run against diffusers', round by round."""
    return [
        Standing(
            where(record["machine"]), ", ".join(_work(row)), f"fused, {_us(row['us a step']['fused'])} us a step",
            f"diffusers, {_us(row['us a step']['diffusers'])} us a step", row["faster by"]["median"],
            row["faster by"]["p80"] < 1,
        )
        for record in records
        for row in record["results"]
    ]  # fmt: skip


def details(records: list[Record]) -> str:
    """Every scheduler, on every machine."""
    return "\n\n".join(["## Fused schedulers", *map(_details, records)])


def _details(record: Record) -> str:
    rows = [[*_work(row), _us(row["us a step"]["fused"]), times(row["faster by"])] for row in record["results"]]
    header = ["scheduler", "sample", "dtype", "us a step (p20 to p80)", "faster than diffusers by"]
    return (
        f"### Fused schedulers, {where(record['machine'])}\n\nWhole runs of {record['results'][0]['steps']} steps "
        f"without a model: set_timesteps, scale_model_input and step.\n\n{table(header, rows)}"
    )

"""The tables of the likelihood side, from its records."""

from __future__ import annotations

from typing import Any

METHODS = {"vlb": "VLB", "vdm": "VDM", "ode": "ODE"}


def scores(record: dict[str, Any]) -> str:
    """Bits per dimension of each set by each method, with the standard error over its pictures."""
    results = record["results"]
    rows = {(row["data"], row["method"]): row for row in results["rows"]}
    sets = list(dict.fromkeys(name for name, _ in rows))
    methods = [method for method in METHODS if any((name, method) in rows for name in sets)]
    each = {m: sum(rows[s, m]["seconds"] for s in sets) / sum(rows[s, m]["pictures"] for s in sets) for m in methods}
    lines = [
        f"| bits/dim | pictures | {' | '.join(f'{METHODS[m]}, {each[m]:.1f} s a picture' for m in methods)} |",
        f"|---|---|{'---|' * len(methods)}",
    ]
    for name in sets:
        of = [rows[name, m] for m in methods]
        figures = [f"{row['bits_per_dim']:.3f} ± {row['standard_error']:.3f}" for row in of]
        lines.append(f"| {name} | {of[0]['pictures']} | {' | '.join(figures)} |")
    return "\n".join([*lines, ""])


def speed(records: list[dict[str, Any]], where: str) -> str:
    """How long a pair (x_t, t) of the full bound takes, and what it took otherwise. records: of one machine."""
    lines = [
        f"{where}; {records[0]['results']['what']}:",
        "",
        "| | ms a pair (p20 to p80) | plain PyTorch, batched: slower by | the usual loop: slower by |",
        "|---|---|---|---|",
    ]
    for record in records:
        variants = record["results"]["variants"]
        ours = variants["diffkern"]["ms a pair"]
        slower = [_spread(variants[name]["diffkern is faster by"]) for name in ("plain PyTorch", "loop")]
        times = f"{ours['median']:.3g} ({ours['p20']:.3g} to {ours['p80']:.3g})"
        lines.append(f"| {record['results']['dtype']} | {times} | {' | '.join(slower)} |")
    return "\n".join([*lines, ""])


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['p20']:.2f} to {value['p80']:.2f})"

"""Text in columns, as the commands print their tables."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows, of which the first is the heading, in columns: the first and words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    columns = [[row[i] for row in rows[1:]] for i in range(len(widths))]
    right = [i > 0 and all(c.lstrip("+-")[:1].isdigit() or c in ("?", "") for c in column)
             for i, column in enumerate(columns)]  # fmt: skip
    lines = (
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)

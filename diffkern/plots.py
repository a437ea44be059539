"""What all plots have in common: matplotlib, imported when one is drawn, and one look."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

DPI = 150


def check() -> None:
    """Raise ValueError if nothing can be drawn here, before any work is done for it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'diffkern[plot]'") from None


def figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    check()
    from matplotlib.figure import Figure  # not pyplot: no window, nothing global

    return Figure(figsize=(width, height), layout="constrained")


def grid(axes: Any, axis: str = "both") -> None:
    """Faint lines behind what is drawn."""
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, axis=axis)


def rendered(drawn: Any, form: str = "png", facts: Mapping[str, str] | None = None) -> bytes:
    """A figure as a file of that form: png, svg or pdf. facts: what the file says of itself, by keyword."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=form, dpi=DPI, metadata=dict(facts or {}))
    return buffer.getvalue()

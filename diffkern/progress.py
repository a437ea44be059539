"""The bar of whatever may take long."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(progress: bool | None, **options: Any) -> Any:
    """tqdm(**options). progress: True, False, or None to show it on a terminal once the work takes longer than two
    seconds."""
    hidden, delay = (None, 2.0) if progress is None else (not progress, 0.0)  # None: where there is no terminal
    return tqdm(disable=hidden, delay=delay, **options)

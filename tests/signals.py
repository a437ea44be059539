"""A process that gets signals while a network runs."""

from __future__ import annotations

import os
from typing import Any

import pytest

from diffkern.models.unet import UNet2D


class InCalls:
    """Counts the calls of every UNet2D, and sends this process a signal in those that are chosen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        """number: the signal."""
        self.choose()
        forward = UNet2D.forward

        def signalled(model: UNet2D, *args: Any, **kwargs: Any) -> Any:
            self.count += 1  # first: the signal may raise
            if self.count - 1 in self.chosen:
                os.kill(os.getpid(), number)
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(UNet2D, "forward", signalled)

    def choose(self, *calls: int) -> None:
        """From now on, the first call being 0."""
        self.count, self.chosen = 0, set(calls)

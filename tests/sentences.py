"""What a user sees who gives a command something that it cannot use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest


def expect_a_sentence(
    run: Callable[[], int | str | None], message: str, capsys: pytest.CaptureFixture[str], left: Sequence[str] = ()
) -> None:
    """run ends with exit code 2 after one sentence with the message in it, and only `left` lies in the folder then."""
    capsys.readouterr()
    try:
        code = run()
    except SystemExit as e:  # how argparse ends
        code = e.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1, f"one sentence, not: {err}"
    assert sorted(os.listdir()) == sorted(left), "nothing is written"

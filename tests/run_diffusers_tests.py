"""Runs diffusers' own scheduler tests on the fused classes, and on diffusers' for comparison.

    python tests/run_diffusers_tests.py path/to/diffusers      # a checkout of the release that is installed

Every class of FUSED is swapped for its fused class in the `diffusers` namespace before the tests import it from there.
A test that passes on diffusers' classes and not on the fused ones is printed, and makes the exit status 1. What needs
the network fails on both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import diffusers
import pytest

from diffkern.integrations.diffusers import FUSED, fused_class


class Outcomes:
    """A pytest plugin that keeps what became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome


def outcomes(checkout: Path, fused: bool) -> dict[str, str]:
    """passed, failed or skipped, by test."""
    if fused:
        for name in FUSED:
            setattr(diffusers, name, fused_class(getattr(diffusers, name)))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(checkout)
    files = [
        str(f) for f in sorted(Path("tests/schedulers").glob("test_*.py")) if any(n in f.read_text() for n in FUSED)
    ]
    kept = Outcomes()
    pytest.main([*files, "-q", "--tb=short", "-p", "no:cacheprovider"], plugins=[kept])
    return kept.of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the folder that tests/schedulers is in")
    checkout = parser.parse_args().checkout.resolve()
    if not (checkout / "tests" / "schedulers").is_dir():
        parser.error(f"{checkout} has no tests/schedulers: give a checkout of diffusers")
    # A process each: a class that a test module has imported cannot be swapped any more.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        plain, fused = (pool.apply(outcomes, (checkout, swap)) for swap in (False, True))
    lost = [test for test, outcome in plain.items() if outcome == "passed" and fused.get(test) != "passed"]
    for name, found in (("diffusers", plain), ("fused", fused)):
        print(f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in Counter(found.values()).most_common())}")
    for test in lost:
        print(f"passes on diffusers' class only: {test}")
    raise SystemExit(1 if lost or not plain else 0)


if __name__ == "__main__":
    main()

"""The README tells the truth: its figures are those of the committed records, its code runs, what it names is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from diffkern.samplers import SAMPLERS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_records():
    assert report.load("end_to_end-*"), "there is a record to report"
    assert report.readme_with_figures() == README, "run: python benchmarks/report.py"
    assert report.details() == report.DETAILS.read_text(encoding="utf-8"), "run: python benchmarks/report.py"


def test_the_python_runs(capsys):
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["x0"].shape == names["x_t"].shape == (4, 3, 32, 32)
    assert names["x0"].abs().max() <= 1
    assert "backend='cpu'" in capsys.readouterr().out


def test_the_files_it_links_to_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("diffkern sample", "python -m pytest -n auto"):
        assert command in README
        assert command in ci


def test_it_lists_as_many_samplers_as_there_are():
    listed = re.search(r"Samplers: (.+?);", README, re.DOTALL)
    assert listed
    assert len(re.split(r",| and ", listed.group(1))) == len(SAMPLERS)

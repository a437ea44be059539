"""The README tells the truth: its figures are those of the committed records, its code runs, what it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffkern.bench.report import pictures, readme, sections
from diffkern.samplers import SAMPLERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def records():
    return sections.checked(ROOT / "benchmarks" / "results")


def test_the_figures_are_those_of_the_records(records):
    assert readme.regions(README, "README.md", records) == README, "run: python benchmarks/report.py"
    found = (ROOT / "docs" / readme.FIGURES).read_text(encoding="utf-8")
    drawn = [picture.FILE for picture in pictures.PICTURES if picture.data(records)]
    assert found == readme.figures(records, drawn), "run: python benchmarks/report.py"


@pytest.mark.parametrize("picture", pictures.PICTURES, ids=lambda picture: picture.FILE)
def test_the_pictures_are_those_of_the_records(records, picture):
    """Their pixels depend on the version of matplotlib; what was drawn does not."""
    if data := picture.data(records):
        drawn = (ROOT / "docs" / picture.FILE).read_bytes()
        assert pictures.digest_of(drawn) == pictures.digest(data), "run: python benchmarks/report.py"
        assert f"](docs/{picture.FILE})" in README


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

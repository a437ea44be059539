"""The README and the pages in docs/ tell the truth: their figures are those of the committed records, their code runs,
what they name is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffkern import cli
from diffkern.bench.report import markup, pictures, readme, sections
from diffkern.samplers import SAMPLERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
RUN = ("diffusers.md", "likelihood.md")  # those whose Python needs no command first, as that of many.md does


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
        assert f"]({picture.FILE})" in PAGES[readme.FIGURES]


def run(page: str) -> dict[str, Any]:
    """The Python of a page, block after block, and what it left behind."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    return names


def test_the_python_runs(capsys):
    names = run(README)
    assert names["x0"].shape == names["x_t"].shape == (4, 3, 32, 32)
    assert names["x0"].abs().max() <= 1
    assert "backend='cpu'" in capsys.readouterr().out


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs(name):
    pytest.importorskip("diffusers")
    assert run(PAGES[name])


def test_no_page_has_python_that_is_not_run():
    assert {name for name, page in PAGES.items() if "```python" in page} == {*RUN, "many.md"}  # it has its own test


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_what_a_page_links_to_is_there(name):
    folder, page = (ROOT, README) if name == "README.md" else (ROOT / "docs", PAGES[name])
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
    for path, _, place in links:
        assert (folder / path).exists(), path
        if place:
            found = re.findall(r"^#+ (.+)$", (folder / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(markup.anchor, found), f"{path}#{place}"


def test_the_commands_of_the_pages_are_taken():
    commands = re.findall(r"^diffkern ((?:sample|likelihood)\b[^\n]*)", "\n".join(PAGES.values()), re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        cli._parser(command.split()).parse_args(command.split())


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("diffkern sample", "python -m pytest -n auto"):
        assert command in README
        assert command in ci


def test_it_lists_as_many_samplers_as_there_are():
    listed = re.search(r"Samplers: (.+?);", README, re.DOTALL)
    assert listed
    assert len(re.split(r",| and ", listed.group(1))) == len(SAMPLERS)

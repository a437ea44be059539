"""`diffkern bench report`: its pictures, its page, and what it says of bad input."""

from __future__ import annotations

import base64
import json
import os
import sys
from html.parser import HTMLParser

import pytest
from records import figures, form, network, spread, workload, write
from sentences import expect_a_sentence

from diffkern import cli
from diffkern.bench.report import bars, markup, pictures, readme, roofline, sections

HOSTILE = "<script>alert('a|b')</script>"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Records of a network and an op, in the working folder."""
    variants = {"diffkern": form(100, 1.0), "diffusers": form(150, spread(1.5, 1.4, 1.6)),
                "OpenVINO": form(80, spread(0.8, 0.7, 0.9))}  # fmt: skip
    copy = figures(20, **{"GFLOP/s": 1.0, "of matmul": 1.0})
    product = figures(400, **{"GFLOP/s": 100.0, "of matmul": 0.5})
    matmul = {**product, "GFLOP/s": 200.0}
    op = workload("linear", {"cpu": product, "torch": figures(800), "copy": copy, "matmul": matmul})
    write(tmp_path / "records", "m/end_to_end-vae", network(HOSTILE, variants))
    write(tmp_path / "records", "m/ops-linear", [op])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "records"


def run(*arguments: str) -> int:
    return cli.main(["bench", "report", *arguments])


def test_bars_are_the_ratios_of_the_record(folder):
    from matplotlib.colors import to_hex

    found = bars.data(sections.checked(folder))
    assert [(b.rival, b.median, b.p20, b.p80) for b in found] == [
        ("diffusers", 1.5, 1.4, 1.6), ("OpenVINO", 0.8, 0.7, 0.9),
    ]  # fmt: skip
    drawn = bars.figure(found)
    tops = [(p.get_y(), p.get_y() + p.get_height(), p.get_facecolor()[:3]) for p in drawn.axes[0].patches]
    assert [top[:2] for top in tops] == [(1, 1.5), (1, pytest.approx(0.8))]
    assert tops[1][2] == pytest.approx((0xD6 / 255, 0x27 / 255, 0x28 / 255)), "a loss is red"
    assert tops[0][2] != tops[1][2]
    assert bars.LOSS not in {to_hex(color) for color in bars.COLORS}, "and nothing else is"


def test_a_point_lies_below_the_ceiling_of_its_own_size(folder):
    (point,) = roofline.data(sections.checked(folder))
    # 40e6 operations on 80e6 bytes in 400 us; a copy of those at 8e4 / 20 GB/s, a matmul at 200 GFLOP/s
    assert (point.intensity, point.reached) == (0.5, pytest.approx(100.0))
    assert (point.copy, point.matmul, point.ceiling) == (4000.0, 200.0, 200.0)


def test_a_picture_knows_the_records_that_it_was_drawn_from(folder):
    records = sections.checked(folder)
    first = pictures.draw(records)
    assert sorted(first) == ["networks.png", "roofline.png"]
    mark = pictures.digest_of(first["networks.png"])
    assert mark == pictures.digest(bars.data(records))
    path = folder / "m" / "end_to_end-vae.json"
    record = json.loads(path.read_text())
    record["results"]["refused"] = {"apex": "not here"}  # which is not drawn
    path.write_text(json.dumps(record, indent=7))
    assert pictures.digest(bars.data(sections.checked(folder))) == mark
    record["results"]["variants"]["OpenVINO"]["diffkern is faster by"]["p80"] = 0.91
    path.write_text(json.dumps(record))
    assert pictures.digest(bars.data(sections.checked(folder))) != mark


def test_a_picture_that_shows_the_records_already_is_kept(folder):
    records = sections.checked(folder)
    drawn = pictures.draw(records)
    old = drawn["networks.png"] + b"of another matplotlib"
    (folder / "networks.png").write_bytes(old)
    (folder / "roofline.png").write_bytes(drawn["networks.png"])  # of something else
    found = pictures.draw(records, kept=folder)
    assert found["networks.png"] == old
    assert pictures.digest_of(found["roofline.png"]) == pictures.digest(roofline.data(records))


class Page(HTMLParser):
    """What is in a page, and whether its elements end where they should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        found = dict(attrs)
        self.links += [found[name] for name in ("href", "src", "xlink:href", "action") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_and_shows_what_it_is_given(folder, capsys):
    assert run(str(folder), "--out", "there") == 0
    assert capsys.readouterr().out.split() == [
        f"there/{name}" for name in ("networks.png", "roofline.png", "figures.md", "report.html")
    ]
    assert sorted(os.listdir("there")) == ["figures.md", "networks.png", "report.html", "roofline.png"]
    text = (folder.parent / "there" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert (page.count["script"], page.count["img"], page.count["svg"]) == (1, 1, 1)
    assert HOSTILE in page.text, "as words"
    for link in page.links:  # nothing is fetched, and what is linked to is there
        assert link.startswith("data:image/png;base64,") or link.removeprefix("#") in page.ids
    picture = next(link for link in page.links if link.startswith("data:"))
    assert base64.b64decode(picture.split(",")[1]) == (folder.parent / "there" / "networks.png").read_bytes()
    assert 'data-op="op0-"' in text
    assert [found for found in page.ids if found.startswith("op0-")]
    assert "prefers-color-scheme: dark" in text
    assert '<td class="number loss">0.80</td>' in text
    assert "diffkern bench ops" in page.text


def test_markup():
    table = "| op | faster by |\n|---|---|\n| a \\| b | 0.5 (0.4 to 0.6) |\n"
    found = markup.to_html(f"## A & b\n\nSay `x < y`.\n\n{table}")
    assert found == (
        '<h2 id="a-b">A &amp; b</h2>\n<p>Say <code>x &lt; y</code>.</p>\n<div class="wide"><table>\n'
        "<thead><tr><th><button>op</button></th><th><button>faster by</button></th></tr></thead>\n<tbody>\n"
        '<tr><td>a | b</td><td class="number loss">0.5 (0.4 to 0.6)</td></tr>\n</tbody>\n</table></div>'
    )


def test_a_readme_is_written_between_its_markers(folder):
    marks = [readme.BEGIN.format(region) + "old\n" + readme.END.format(region) for region in sections.README]
    path = folder.parent / "README.md"
    path.write_text("Before.\n" + "between\n".join(marks) + "After.\n", encoding="utf-8")
    (folder.parent / "docs").mkdir()
    assert run(str(folder), "--readme", "README.md") == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("Before.\n<!-- ")
    assert text.endswith("<!-- end of losses -->\nAfter.\n")
    assert "old" not in text
    assert "| 100 ms | 1.50 | 0.80 |" in text
    assert sorted(os.listdir("docs")) == ["figures.md", "networks.png", "roofline.png"]
    assert "| linear | m" not in text
    assert run(str(folder), "--readme", "README.md") == 0
    assert path.read_text(encoding="utf-8") == text
    for spoiled in (text + marks[0], text.replace("<!-- end of figures -->\n", "")):
        path.write_text(spoiled, encoding="utf-8")
        assert run(str(folder), "--readme", "README.md") == 2
        assert path.read_text(encoding="utf-8") == spoiled


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: "{", "is not valid JSON"),
        (lambda record: json.dumps([1]), "it has no machine and results"),
        (lambda record: json.dumps({**record, "machine": {"devices": {}, "versions": {}}}), "it lacks 'cpu'"),
        (lambda record: json.dumps({**record, "results": {**record["results"], "profile": 3}}), "be reported: 'int'"),
        (lambda record: json.dumps(record).replace("first call", "last call"), "it lacks 'first call, seconds'"),
    ],
)
def test_a_bad_record_gets_a_sentence(folder, capsys, spoil, message):
    path = folder / "m" / "end_to_end-vae.json"
    path.write_text(spoil(json.loads(path.read_text())))
    expect_a_sentence(lambda: run(str(folder), "--out", "there"), message, capsys, left=["records"])


def test_bad_arguments_get_a_sentence(folder, capsys):
    (folder / "empty").mkdir()
    (folder / "README.md").write_text("no markers\n")
    for arguments, message in (
        (["nowhere"], "there is no folder nowhere of records"),
        (["records/empty"], "records/empty has no records in it"),
        (["records", "--out", "a", "--readme", "b"], "give --out or --readme, not both"),
        (["records", "--readme", "records/none.md"], "cannot read records/none.md"),
        (
            ["records", "--readme", "records/README.md"],
            "README.md must have one line '<!-- likelihoods: diffkern bench",
        ),
        (["records", "--out", "records/README.md"], "cannot write records/README.md"),
    ):
        expect_a_sentence(lambda a=arguments: run(*a), message, capsys, left=["records"])


def test_without_matplotlib_it_says_so(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    expect_a_sentence(lambda: run(str(folder)), "plots need matplotlib: pip install", capsys, left=["records"])


def test_what_there_is_nothing_of_is_not_drawn(folder):
    write(folder, "m/ops-linear", [])
    assert list(pictures.draw(sections.checked(folder))) == ["networks.png"]

"""HTML of the Markdown that sections write: headings, paragraphs, tables and code. All of it is escaped."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Iterator

NUMBER = re.compile(r"[+-]?\d|-$")
RATIOS = re.compile("faster by|times as fast")  # of what less than 1 is a loss


def anchor(heading: str) -> str:
    """What a link to a heading ends with."""
    return re.sub(r"\W+", "-", heading.lower()).strip("-")


def headings(markdown: str) -> list[str]:
    """Those of the second order."""
    return re.findall(r"^## (.+)$", markdown, re.MULTILINE)


def to_html(markdown: str) -> str:
    """Every block of it."""
    groups = itertools.groupby(markdown.splitlines(), key=_kind)
    return "\n".join(block for kind, lines in groups for block in _blocks(kind, list(lines)))


def _kind(line: str) -> str:
    return "#" if line.startswith("#") else "|" if line.startswith("|") else "text" if line.strip() else ""


def _blocks(kind: str, lines: list[str]) -> Iterator[str]:
    if kind == "#":
        for line in lines:
            marks, _, words = line.partition(" ")
            yield f'<h{len(marks)} id="{anchor(words)}">{_inline(words)}</h{len(marks)}>'
    elif kind == "|":
        yield _table([_cells(line) for line in lines])
    elif kind == "text":
        yield f"<p>{_inline(' '.join(lines))}</p>"


def escaped(text: str) -> str:
    """Whatever it is, shown as it is."""
    return html.escape(text)


def _inline(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escaped(text))


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _table(rows: list[list[str]]) -> str:
    """The second row is the line below the heading."""
    header, _, *body = rows
    head = "".join(f"<th><button>{_inline(cell) or '&nbsp;'}</button></th>" for cell in header)
    lines = "\n".join(f"<tr>{''.join(_cell(*pair) for pair in zip(header, row, strict=True))}</tr>" for row in body)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def _cell(heading: str, cell: str) -> str:
    kinds = ["number"] if NUMBER.match(cell) else []
    if RATIOS.search(heading) and cell.startswith("0."):
        kinds.append("loss")
    return f'<td class="{" ".join(kinds)}">{_inline(cell)}</td>' if kinds else f"<td>{_inline(cell)}</td>"


def figure(picture: str, about: str) -> str:
    """A picture, which is HTML already, with what is said of it."""
    return f"<figure>\n{picture}\n<figcaption>{_inline(about)}</figcaption>\n</figure>"


def links(names: Iterable[str]) -> str:
    """To headings."""
    return "\n".join(f'<a href="#{anchor(name)}">{_inline(name)}</a>' for name in names)

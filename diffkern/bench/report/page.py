"""report.html: all of a report in one file that asks no network for anything."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from string import Template

from diffkern import plots
from diffkern.bench.report import markup, pictures, roofline, sections
from diffkern.bench.report.pictures import Picture
from diffkern.bench.report.records import Record, by_machine

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>diffkern: benchmarks</title>
<style>
:root { --paper: #fff; --ink: #1c1e21; --faint: #6a7076; --line: #dfe2e6; --row: #f5f6f8; --link: #1f66a8;
        --loss: #c02122 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #dfe2e6; --faint: #959ba3; --line: #34383e; --row: #1e2125; --link: #79b4ea;
          --loss: #ff8a80 }
  img, svg { filter: invert(0.91) hue-rotate(180deg) }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 80rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0 }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line) }
h3 { margin-top: 2rem }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; margin: 1rem 0 }
a { color: var(--link) }
code { font-size: 0.9em; overflow-wrap: anywhere }
figure { margin: 1.5rem 0 }
figure img, figure svg { display: block; max-width: 100%; height: auto }
.ops { display: flex; flex-wrap: wrap; gap: 0.3rem; margin-bottom: 1rem }
.ops button { font: inherit; font-size: 13px; padding: 0 0.6rem; cursor: pointer; color: inherit;
              background: var(--row); border: 1px solid var(--line); border-radius: 1rem }
.ops button[aria-pressed=true] { color: var(--paper); background: var(--ink) }
figcaption, .about { color: var(--faint) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px }
th { padding: 0; text-align: left; border-bottom: 2px solid var(--line); vertical-align: bottom }
th button { all: unset; box-sizing: border-box; width: 100%; padding: 0.3rem 0.7rem; cursor: pointer }
th button:focus-visible { outline: 2px solid var(--link) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
td { padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line) }
tbody tr:hover { background: var(--row) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.loss { color: var(--loss) }
</style>
</head>
<body>
<h1>diffkern: benchmarks</h1>
<p class="about">$about A click on the heading of a column sorts by it.</p>
<nav>
$links
</nav>
$body
<script>
const value = (row, i) => row.cells[i].textContent.trim()
const scale = text => parseFloat(text) * (/^[\\d.]+ T/.test(text) ? 1000 : 1)
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0]
  heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1
    heads.forEach(other => other.removeAttribute("aria-sort"))
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending")
    const order = (a, b) => {
      const [x, y] = [scale(value(a, i)), scale(value(b, i))]
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || sign * value(a, i).localeCompare(value(b, i))
      return sign * (x - y)
    }
    body.append(...[...body.rows].sort(order))
  }))
}
const buttons = [...document.querySelectorAll("[data-op]")]
buttons.forEach(button => button.addEventListener("click", () => {
  const alone = button.getAttribute("aria-pressed") !== "true"
  buttons.forEach(other => other.setAttribute("aria-pressed", alone && other === button))
  for (const mark of document.querySelectorAll("svg [id^=op]"))
    mark.style.opacity = !alone || mark.id.startsWith(button.dataset.op) ? 1 : 0.05
}))
</script>
</body>
</html>
""")


def page(records: list[Record], drawn: Mapping[str, bytes]) -> str:
    """The page. drawn: the pictures, as PNGs."""
    text = sections.details(records)
    shown = [_picture(picture, records, drawn) for picture in pictures.PICTURES if picture.FILE in drawn]
    return PAGE.substitute(
        about=markup.escaped(f"{len(records)} records: {'; '.join(by_machine(records))}."),
        links=markup.links(markup.headings(text)),
        body="\n".join([*shown, markup.to_html(text)]),
    )


def _picture(picture: Picture, records: list[Record], drawn: Mapping[str, bytes]) -> str:
    if picture is roofline:
        return _roofline(records)
    encoded = base64.b64encode(drawn[picture.FILE]).decode()
    image = f'<img src="data:image/png;base64,{encoded}" alt="{markup.escaped(pictures.alt(picture))}">'
    return markup.figure(image, picture.ABOUT)


def _roofline(records: list[Record]) -> str:
    """As an SVG in the page, with a button for each op that shows it alone."""
    points = roofline.data(records)
    svg = plots.rendered(roofline.figure(points), "svg").decode()
    buttons = "\n".join(
        f'<button data-op="op{i}-" aria-pressed="false">{markup.escaped(op)}</button>'
        for i, op in enumerate(roofline.ops_of(points))
    )
    return markup.figure(f'<div class="ops">\n{buttons}\n</div>\n{svg[svg.index("<svg") :]}', roofline.ABOUT)

"""The frame of an HTML report: one file that needs nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5c6570; --paper: #fff;
  --line: #d9dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --faint: #98a2ae;
  --paper: #14171b; --line: #333a43; --card: #1c2127; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 52rem; }
.faint, figcaption { color: var(--faint); font-size: .87rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; }
th.name, td.name { text-align: left; white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr));
  gap: 0 2rem; margin: 0; }
.facts div { display: flex; justify-content: space-between; gap: 1rem; padding: .12rem 0;
  border-bottom: 1px solid var(--line); font-size: .9rem; }
.facts dt { color: var(--faint); white-space: nowrap; }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
svg.chart { width: 100%; height: auto; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem .7rem; margin: 0; break-inside: avoid; }
.card .name { font-weight: 600; font-size: .87rem; overflow-wrap: anywhere; }
.card .pictures { display: flex; gap: .6rem; align-items: flex-end; margin-top: .3rem; }
.card .pictures div { flex: 1; font-size: .75rem; color: var(--faint); min-width: 0; }
.card img { width: 100%; aspect-ratio: 1; display: block; image-rendering: pixelated; }
.histogram { width: 100%; display: block; fill: none; color: var(--faint); }
.histogram text { font-size: 10px; fill: currentColor; }
.scale { display: inline-block; width: 12rem; height: .7rem; vertical-align: middle; }
@media print { body { max-width: none; padding: 0; font-size: 11px; color: #000;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  :root { --ink: #000; --faint: #444; --paper: #fff; --line: #bbb; --card: #fff; }
  h2, h3 { break-after: avoid; } tr, svg.chart { break-inside: avoid; }
  .cards { grid-template-columns: repeat(3, 1fr); } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole page; ``title`` is text, ``body`` HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, faint: bool = False) -> str:
    return f"<p{' class=faint' if faint else ''}>{html.escape(text)}</p>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values of text, in as many columns as there is room for."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in pairs
    )
    return f'<dl class="facts">{cells}</dl>'


def table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of text under ``head``; the first ``left`` columns are names."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=name' if i < left else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row('td', line)}</tr>" for line in lines)
    return (
        f'<div class="wide"><table><thead><tr>{row("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )

"""One self-contained HTML page: text, tables and inline SVG; no scripts, no outside assets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --line: #ddd; --paper: #fff; --good: #00674b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #9aa; --line: #3a3d42; --paper: #16181b; --good: #4fd1a5 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
p.note { color: var(--soft); max-width: 60ch }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
td.best { color: var(--good); font-weight: 600 }
.plots { display: grid; margin-top: 1.2rem; gap: 1.5rem 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; max-width: 44rem } figure svg { width: 100%; height: auto }
figcaption { color: var(--soft); font-size: .9rem }
"""


def table(head: Sequence[str], rows: Iterable[Sequence[tuple[str, bool]]]) -> str:
    """A table that scrolls sideways on a phone; each cell is (text, is the best of its column)."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=best' if good else ''}>{escape(text)}</td>" for text, good in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def plots(figures: Iterable[tuple[str, str]]) -> str:
    """(caption, svg) pairs side by side where there is room."""
    inner = "".join(
        f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, drawing in figures
    )
    return f'<div class="plots">{inner}</div>'


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        + "".join(parts)
        + "</body></html>\n"
    )

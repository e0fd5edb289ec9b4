"""One self-contained HTML page: text, tables and inline SVG; no scripts, no outside assets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #14181d; --soft: #5c6672; --line: #e3e7eb; --paper: #fff;
  --card: #f5f7f8;
  --good: #0b7a5c; --warn: #8f5b00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9edf1; --soft: #a0abb7; --line: #2a3038; --paper: #0e1115; --card: #161a20;
  --good: #4bd6a8;
    --warn: #f0b849 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.4rem 1.25rem 3rem; max-width: 72rem; background: var(--paper);
  color: var(--ink);
  font: 16px/1.55 Inter, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums }
h1 { font-size: 1.35rem; letter-spacing: -.015em; margin: 0 0 1rem } h2 { font-size: 1.1rem;
  margin: 2.2rem 0 .5rem }
p.lead { font-size: 1.25rem; line-height: 1.4; max-width: 46ch; margin: 0 0 1.4rem; letter-spacing: -.01em;
  font-weight: 500 }
p.note { color: var(--soft); max-width: 75ch; white-space: pre-line; font-size: .94rem }
p.warning { color: var(--warn); border: 1px solid; border-radius: 8px; padding: .6rem .9rem; max-width: 75ch }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12rem), 1fr)) }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem }
.tile span { display: block; color: var(--soft); font-size: .85rem }
.tile b { display: block; font-size: 1.7rem; font-weight: 600; letter-spacing: -.025em; line-height: 1.3 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem }
th { color: var(--soft); font-weight: 500; vertical-align: bottom }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: pre }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper) }
td.best { color: var(--good); font-weight: 600 }
.plots { display: grid; margin-top: 1.6rem; gap: 1.8rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; max-width: 44rem } figure svg { width: 100%; height: auto }
figcaption { color: var(--soft); font-size: .9rem; margin-bottom: .3rem }
@media (max-width: 40rem) {
  body { padding: 1rem .9rem 2rem } p.lead { font-size: 1.1rem } .tiles { grid-template-columns: 1fr 1fr;
  gap: .6rem }
  .tile { padding: .6rem .8rem } .tile b { font-size: 1.4rem }
  table { font-size: .8rem } th { white-space: normal } th, td { padding: .35rem .35rem }
  th:last-child, td:last-child { padding-right: 0 }
}
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
        f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"
        for caption, drawing in figures
    )
    return f'<div class="plots">{inner}</div>'


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def lead(text: str) -> str:
    """The outcome, before anything else."""
    return f'<p class="lead">{escape(text)}</p>'


def warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Figures at a glance: (name, value, what to compare it with)."""
    inner = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in items
    )
    return f'<div class="tiles">{inner}</div>'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        + "".join(parts)
        + "</body></html>\n"
    )

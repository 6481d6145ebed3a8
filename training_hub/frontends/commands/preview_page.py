"""A preview as a page that needs nothing but a browser: light and dark, each token with its place, id and weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING

from training_hub.frontends.commands.preview_text import counted, number_of, title, visible
from training_hub.monitoring.report import STYLE as REPORT_STYLE
from training_hub.monitoring.words import printable

if TYPE_CHECKING:
    from training_hub.data.preview import Preview, ShownRow, ShownSample

STYLE = """
:root { --trained: #bfe8c5; --weighted: #fbdf9a; --special: #8d2f9b; --wrong: #b3261e; --edge: #b4bbc3; }
@media (prefers-color-scheme: dark) { :root { --trained: #1f5a35; --weighted: #6b4e10; --special: #e6a6f0;
  --wrong: #ff8a80; --edge: #515a65; } }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.9 ui-monospace, Menlo, Consolas,
  monospace; }
.tokens span { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 0 var(--edge); color: var(--quiet); }
.tokens .t { background: var(--trained); color: var(--ink); }
.tokens .w { background: var(--weighted); color: var(--ink); }
.tokens .s { color: var(--special); font-weight: 600; }
.tokens sub { font-size: 10px; }
.wrong { color: var(--wrong); overflow-wrap: anywhere; } .note { color: var(--quiet); }
.raw { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--quiet); font-size: 13px; }
"""


def preview_page(found: Preview) -> str:
    """The page as text. Whatever the data holds is escaped, and the page may neither load nor run anything."""
    rows = "".join(_row(row) for row in found.rows)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Rows as they will be trained</title><style>{REPORT_STYLE}{STYLE}</style></head><body>"
        f'<h1>Rows as they will be trained</h1>{_legend()}{rows}<section class="card"><h2>All rows</h2>'
        f"{_counts(found)}{_lines('wrong', found.counts.get('problem_lines', ()))}</section></body></html>\n"
    )


def _legend() -> str:
    return (
        '<p class="lead tokens"><span class="t">trained</span> <span class="w">trained with another weight'
        '<sub>0.5</sub></span> <span>not trained</span> <span class="s">special token</span> · space, ↵ line break</p>'
    )


def _row(row: ShownRow) -> str:
    samples = "".join(
        f'<h2>{_text(title(row, number))}</h2><p class="tokens">{"".join(_tokens(sample))}</p>'
        for number, sample in enumerate(row.samples)
    )
    heading = "" if row.samples else f"<h2>{_text(title(row))}</h2>"
    raw = f'<p class="raw">{_text(row.raw)}</p>' if row.raw else ""
    about = _lines("wrong", row.problems) + _lines("note", row.notes)
    return f'<section class="card">{heading}{samples}{about}{raw}</section>'


def _tokens(sample: ShownSample) -> Iterator[str]:
    tokens = zip(sample.ids, sample.tokens, sample.weights, sample.is_special, strict=True)
    for number, (one, token, weight, is_special) in enumerate(tokens):
        names = ["t" if weight == 1 else "w"] if weight else []
        names += ["s"] if is_special else []
        kind = f' class="{" ".join(names)}"' if names else ""
        is_last = number + 1 == len(sample.ids) or sample.weights[number + 1] != weight
        shown = f"<sub>{number_of(weight)}</sub>" if is_last and weight not in (0, 1) else ""
        about = f"token {number + 1}, id {one}, weight {number_of(weight)}"
        yield f'<span{kind} title="{about}">{escape(visible(token, one), quote=True)}{shown}</span>'


def _counts(found: Preview) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(what)}</th><td>{_text(value)}</td></tr>' for what, value in counted(found.counts)
    )
    return f"<table>{rows}</table>"


def _lines(kind: str, lines: Iterable[str]) -> str:
    return "".join(f'<p class="{kind}">{_text(line)}</p>' for line in lines)


def _text(value: str) -> str:
    return escape(printable(value), quote=True)

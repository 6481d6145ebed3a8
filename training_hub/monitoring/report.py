"""report.html: a run on one page that needs nothing but a browser."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from training_hub.folders import write_text
from training_hub.monitoring.charts import Curve, line_chart
from training_hub.monitoring.settings import flattened, redacted
from training_hub.monitoring.words import printable

FILE_NAME = "report.html"
PROFILE = "profile.json"

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1c1e21; --quiet: #646b73;
  --rule: #e3e5e8; --first: #2f6fde; --second: #d9622b; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f24; --ink: #e6e8eb; --quiet: #98a1ab;
  --rule: #30353c; --first: #78a9ff; --second: #ff9d6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
.lead { color: var(--quiet); margin: 0 0 1.5rem; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 0 1.5rem; }
.facts div, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.facts div { padding: .6rem .85rem; }
.facts dt { color: var(--quiet); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
.card { padding: 1rem 1.1rem; min-width: 0; margin: 0 0 1rem; }
.cards .card { margin: 0; }
.cards + .card, .cards + details { margin-top: 1rem; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); } .axis { stroke: var(--quiet); } .tick { fill: var(--quiet); font-size: 12px; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.curve.first { stroke: var(--first); } .curve.second { stroke: var(--second); }
.dot.first { fill: var(--first); } .dot.second { fill: var(--second); }
.key { color: var(--quiet); font-size: .85rem; margin: 0 0 .35rem; }
.key b { font-weight: 600; } .key .first { color: var(--first); } .key .second { color: var(--second); }
.empty { color: var(--quiet); }
summary { cursor: pointer; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin-top: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .28rem .5rem .28rem 0; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--quiet); width: 42%; }
td { font-variant-numeric: tabular-nums; white-space: pre-wrap; }
"""

CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("loss", "training"), ("validation_loss", "validation"))),
    ("Learning rate", (("learning_rate", "learning rate"),)),
    ("Tokens per second", (("tokens_per_second", "useful"), ("trained_tokens_per_second", "trained"))),
    ("Gradient norm", (("grad_norm", "gradient norm"),)),
)
"""Title of each chart, and its lines: key in metrics.jsonl, and name."""

HEADLINES = (
    ("loss", "loss"),
    ("validation_loss", "validation loss"),
    ("validation_perplexity", "validation perplexity"),
    ("tokens_per_second", "tokens per second"),
    ("trained_tokens_per_second", "trained per second"),
    ("peak_fraction", "share of measured peak"),
    ("grad_norm", "gradient norm"),
    ("memory_gib", "memory (GiB)"),
    ("osft_leak", "largest leak"),
    ("osft_drift", "drift"),
    ("watch_loss", "loss on watched rows"),
    ("watch_drift", "rise on watched rows"),
)


def write_report(run_folder: Path, history: Sequence[Mapping[str, Any]], result_facts: Mapping[str, Any]) -> Path:
    """Write report.html into `run_folder` and return its path: charts of `history` and tables of `result_facts`.

    `history` holds rows as in metrics.jsonl; keys they lack leave gaps. Entries of `result_facts` that are mappings
    ("settings", "metrics", "plan", "versions") become a table each, the others one table. Text is escaped and
    what looks like a secret is left out. The file is whole or not there.
    """
    path = run_folder / FILE_NAME
    facts = {**redacted(result_facts), **_profile(run_folder / PROFILE)}
    write_text(path, report_page(run_folder.resolve().name, history, facts))
    return path


def _profile(file: Path) -> dict[str, Any]:
    """Where the time of a step went, if the run was asked to find out."""
    if not file.is_file():
        return {}
    return {"seconds of a step": json.loads(file.read_text(encoding="utf-8"))["seconds"]}


def report_page(title: str, history: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The page as text."""
    charts = "".join(_chart(name, lines, history) for name, lines in CHARTS)
    plain = {key: value for key, value in facts.items() if not isinstance(value, Mapping)}
    tables = "".join(_table(key, value) for key, value in facts.items() if isinstance(value, Mapping) and value)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded and nothing runs, whatever a run's settings contain.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)} - training report</title><style>{STYLE}</style></head><body>"
        f'<h1>{_text(title)}</h1><p class="lead">{_text(_lead(history, facts))}</p>'
        f'{_headlines(history)}<div class="cards">{charts}</div>'
        f"{_table('result', plain) if plain else ''}{tables}</body></html>\n"
    )


def _lead(history: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    steps = f"{len([row for row in history if row['step'] > 0]):,} steps"
    tokens = sum(row.get("tokens") or 0 for row in history)
    return " · ".join(str(part) for part in (facts.get("status"), steps, f"{tokens:,} tokens") if part)


def _headlines(history: Sequence[Mapping[str, Any]]) -> str:
    """The last value of each kind that was ever measured."""
    boxes = []
    for key, name in HEADLINES:
        last = next((row[key] for row in reversed(history) if row.get(key) is not None), None)
        if last is not None:
            boxes.append(f"<div><dt>{_text(name)}</dt><dd>{_text(_value(last))}</dd></div>")
    return f'<dl class="facts">{"".join(boxes)}</dl>' if boxes else ""


def _chart(title: str, lines: Sequence[tuple[str, str]], history: Sequence[Mapping[str, Any]]) -> str:
    curves = []
    for (key, name), style in zip(lines, ("first", "second"), strict=False):
        points = [(float(row["step"]), _float(row[key])) for row in history if key in row]
        if points:
            curves.append(Curve(name, points, style))
    shown = (f'<b class="{curve.style}">{_text(curve.name)}</b>' for curve in curves)
    key_line = f'<p class="key">{" · ".join(shown)}</p>' if len(curves) > 1 else ""
    return f'<section class="card"><h2>{_text(title)}</h2>{key_line}{line_chart(curves, f"{title} by step")}</section>'


def _table(title: str, entries: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(_value(value))}</td></tr>'
        for key, value in flattened(entries).items()
    )
    # Settings are long and seldom looked at; numbers are what the page is opened for.
    is_open = " open" if title in ("result", "metrics") else ""
    return f'<details class="card"{is_open}><summary>{_text(title)}</summary><table>{rows}</table></details>'


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.5g}"
    if isinstance(value, list | tuple):
        return "\n".join(_value(inner) for inner in value) if value else "-"
    return "-" if isinstance(value, Mapping) else str(value)


def _text(value: Any) -> str:
    return escape("\n".join(printable(line) for line in str(value).split("\n")), quote=True)

"""What a continual study says: a table for the terminal, JSON and CSV for programs, and a page with charts."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from training_hub.experiments.continual import ContinualResult
from training_hub.folders import write_json, write_text
from training_hub.monitoring.charts import Curve, line_chart
from training_hub.monitoring.report import STYLE

FILE = "continual"
MEASURES = ("average_accuracy", "backward_transfer", "forgetting", "new_task_score", "watch_rise")
COLOURS = ("#2f6fde", "#d9622b", "#2a9d63", "#9b59d0", "#c2a000", "#d0457f")
"""Of the methods, in order; after the last the first comes again."""

MEANINGS = {
    "average_accuracy": "mean over all tasks at the end",
    "backward_transfer": "what later tasks changed in earlier ones; negative is forgetting",
    "forgetting": "how far earlier tasks are below their best at the end",
    "new_task_score": "each task just after it was trained; compare forgetting only where this is alike",
    "watch_rise": "by how much the loss on evaluation.watch rose from before the first task to after the last, in nats",
}


def write_files(result: ContinualResult) -> list[Path]:
    """Write continual.json, .csv and .html into the folder of the study; their paths."""
    paths = [result.output / f"{FILE}.{ending}" for ending in ("json", "csv", "html")]
    write_json(paths[0], as_json(result))
    write_text(paths[1], as_csv(result))
    write_text(paths[2], page(result))
    return paths


def as_json(result: ContinualResult) -> dict[str, Any]:
    """Everything, plainly; matrices as lists of rows, numbers that are not finite as null."""
    content = {
        "tasks": list(result.tasks),
        "score": result.score,
        "base": list(result.base),
        "courses": [
            {
                "method": one.method,
                "seed": one.seed,
                "scores": [list(row) for row in one.scores],
                "losses": [list(row) for row in one.losses],
                "watch": list(one.watch),
                "seconds": one.seconds,
                **one.measures(),
            }
            for one in result.courses
        ],
    }
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def as_csv(result: ContinualResult) -> str:
    """One line for each score: method, seed, after (tasks trained, from 1), trained, task, score, loss."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("method", "seed", "after", "trained", "task", "score", "loss"))
    for one in result.courses:
        for i, trained in enumerate(result.tasks):
            for j, task in enumerate(result.tasks):
                lines.writerow((one.method, one.seed, i + 1, trained, task, one.scores[i][j], one.losses[i][j]))
    return text.getvalue()


def table(result: ContinualResult) -> Iterator[str]:
    """Lines for a terminal: the matrix of each method, its mean over seeds, and the measures with their spread."""
    width = max(12, *(len(name) + 1 for name in result.tasks))
    head = "".join(f"{name:>{width}}" for name in result.tasks)
    what = {"loss": "minus the loss in nats"}.get(result.score, result.score)
    for method in result.methods():
        yield f"{method}: {what} on each task (columns) after each (rows), mean of {len(result.of(method))} seeds"
        yield f"{'':<{width + 2}}{head}"
        rows = [("before", result.base), *zip(result.tasks, _mean_matrix(result, method), strict=True)]
        for name, row in rows:
            yield f"  {name:<{width}}" + "".join(f"{score:>{width}.3f}" for score in row)
        yield ""
    names = [name for name in MEASURES if any(name in one.measures() for one in result.courses)]
    yield f"{'method':<14}" + "".join(f"{name:>22}" for name in names)
    for method in result.methods():
        yield f"{method:<14}" + "".join(f"{spread(result, method, name):>22}" for name in names)


def spread(result: ContinualResult, method: str, measure: str) -> str:
    """Mean and standard deviation of a measure over the seeds, '0.512 +- 0.013'; '-' where it is not measured."""
    values = [one.measures()[measure] for one in result.of(method) if measure in one.measures()]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} +- {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def page(result: ContinualResult) -> str:
    """The page: the average over the tasks so far as lines, each method's matrix, and the measures."""
    styles = "".join(
        f".curve.m{place} {{ stroke: {COLOURS[place % len(COLOURS)]}; }} .dot.m{place}, .key .m{place} "
        f"{{ fill: {COLOURS[place % len(COLOURS)]}; color: {COLOURS[place % len(COLOURS)]}; }}\n"
        for place in range(len(result.methods()))
    )
    cards = "".join(_card(f"{method}: A[i][j]", _matrix(result, method)) for method in result.methods())
    seeds = sorted({one.seed for one in result.courses})
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>continual learning</title><style>{STYLE}{styles}</style></head><body><h1>Continual learning</h1>"
        f'<p class="lead">{len(result.tasks)} tasks, score {escape(result.score)}, seeds '
        f"{', '.join(map(str, seeds))}; means over seeds</p>"
        f'<div class="cards">{_card("Mean score over the tasks trained so far", _lines(result))}{cards}</div>'
        f"{_card('Measures', _measures(result))}</body></html>\n"
    )


def _lines(result: ContinualResult) -> str:
    curves = []
    for place, method in enumerate(result.methods()):
        rows = _mean_matrix(result, method)
        points = [(float(i + 1), statistics.fmean(row[: i + 1])) for i, row in enumerate(rows)]
        curves.append(Curve(method, points, f"m{place}"))
    key = " · ".join(f'<b class="{curve.style}">{escape(curve.name)}</b>' for curve in curves)
    chart = line_chart(curves, "mean score over the tasks trained so far", "tasks trained")
    return f'<p class="key">{key}</p>{chart}'


def _matrix(result: ContinualResult, method: str) -> str:
    """The mean matrix as a table; a cell's tint is its place between the lowest and the highest score of the study."""
    everything = [score for one in result.courses for row in one.scores for score in row] + list(result.base)
    low, high = min(everything), max(everything)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *result.tasks))
    named = [("before", result.base), *((f"after {n}", row) for n, row in _named_rows(result, method))]
    body = ""
    for name, row in named:
        tints = (100 * (score - low) / ((high - low) or 1.0) for score in row)
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--first) {0.5 * tint:.0f}%, transparent)">{score:.3f}</td>'
            for score, tint in zip(row, tints, strict=True)
        )
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f"<table><tr>{head}</tr>{body}</table>"


def _named_rows(result: ContinualResult, method: str) -> Iterator[tuple[str, Sequence[float]]]:
    return zip(result.tasks, _mean_matrix(result, method), strict=True)


def _measures(result: ContinualResult) -> str:
    names = [name for name in MEASURES if any(name in one.measures() for one in result.courses)]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *result.methods()))
    body = "".join(
        f'<tr><th scope="row">{name}: {MEANINGS[name]}</th>'
        + "".join(f"<td>{spread(result, method, name).replace('+-', '±')}</td>" for method in result.methods())
        + "</tr>"
        for name in names
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _card(title: str, inside: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>{inside}</section>'


def _mean_matrix(result: ContinualResult, method: str) -> list[list[float]]:
    matrices = [one.scores for one in result.of(method)]
    places = range(len(result.tasks))
    return [[statistics.fmean(matrix[i][j] for matrix in matrices) for j in places] for i in places]

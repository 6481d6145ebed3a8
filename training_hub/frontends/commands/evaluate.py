"""`training-hub eval`: saved models on rows; scores side by side on the screen, answers and scores in files."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from training_hub.recipe.evaluation import Evaluation
from training_hub.recipe.recipe import Recipe

NO_OUTPUT = "(none)"
"""Stands for `output` where no folder is given."""

USAGE = """training-hub eval --model M [--model M2 ...] --data D [--metrics exact_match f1 ...] [--rows N] [--output O]
                         [--section.field VALUE ...] [section.field=VALUE ...]"""


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("eval")
    group.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help="exact_match, normalized_match, accuracy, f1, bleu, chrf, rouge, or package.module:function or "
        "file.py:function; with only loss or perplexity nothing is generated (default: evaluation.metrics)",
    )
    group.add_argument("--rows", type=int, metavar="N", help="answer so many rows, spread over the data (default: all)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer, as evaluation.max_new_tokens")
    group.add_argument("--batch-tokens", type=int, metavar="N", help="generated at once, as evaluation.batch_tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="draw tokens, as evaluation.temperature")
    group.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest, as evaluation.top_p")
    group.add_argument("--json", action="store_true", help="print scores as JSON, by model")


def run(recipe: Recipe, options: Namespace) -> int:
    """Print the scores of each model on the rows of data.path; files where `output` is given."""
    from training_hub.backends import Given
    from training_hub.experiments.comparison import compare, table
    from training_hub.launch import is_first
    from training_hub.monitoring.console import open_console

    models = [text for path, _, text in options.assignments if path == "model.path"] or [recipe.model.path]
    recipe = recipe.model_copy(update={"evaluation": _asked(recipe.evaluation, options)})
    output = None if recipe.output == NO_OUTPUT else Path(recipe.output)
    console = open_console(recipe.monitoring.console if is_first(recipe) else "off", sys.stderr)
    result = compare(recipe, models, Given(), console, output, stream=sys.stderr)
    if not is_first(recipe):
        return 0
    if options.json:
        print(json.dumps(json.loads(json.dumps(result.scores), parse_constant=lambda _: None), indent=2))
    else:
        print("\n".join(table(result)))
    if output is not None:
        print(f"written: {output}", file=sys.stderr)
    return 0


def _asked(section: Evaluation, options: Namespace) -> Evaluation:
    """The section with what the flags say. Raises RecipeError."""
    from training_hub.experiments.comparison import generates
    from training_hub.recipe.load import build

    metrics = [one for text in options.metrics or section.metrics for one in text.split(",") if one]
    flags: dict[str, Any] = {
        "metrics": metrics,
        "max_new_tokens": options.max_new_tokens,
        "batch_tokens": options.batch_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    answers: bool | int = options.rows if options.rows is not None else section.generate or True
    if not generates(metrics):
        answers = False
        given.pop("metrics")
    changed = {**section.model_dump(exclude_defaults=True, exclude={"metrics"}), **given, "generate": answers}
    # As a recipe of its own, so that what is wrong is told as everywhere.
    settings = {f"evaluation.{name}": value for name, value in changed.items()}
    spelled = {f"evaluation.{name}": f"--{name.replace('_', '-')}" for name in given}
    return build(
        {"model.path": "m", "output": NO_OUTPUT, **settings},
        spelled={**spelled, "evaluation.generate": "--rows"},
        live=("data.validation",),
    ).evaluation

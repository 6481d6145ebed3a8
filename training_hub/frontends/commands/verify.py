"""`training-hub verify`: the recipe for a few steps in one process and in its own layout, number by number."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from training_hub.errors import TrainingError
from training_hub.recipe.recipe import Recipe

if TYPE_CHECKING:
    from training_hub.experiments.verify import Comparison

STEPS = 4


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--compared-steps", type=_count, default=STEPS, metavar="N", help=f"optimizer steps of each run ({STEPS})"
    )
    parser.add_argument("--json", action="store_true", help="print the differences as one JSON object")


def run(recipe: Recipe, options: Namespace) -> int:
    """Print the differences; 0 where rounding explains them, else the exit code of TrainingError."""
    from training_hub.experiments.verify import verify
    from training_hub.monitoring.console import open_console

    style = "off" if options.json else recipe.monitoring.console
    recipe = recipe.model_copy(update={"monitoring": recipe.monitoring.model_copy(update={"console": style})})
    with tempfile.TemporaryDirectory(prefix="training_hub-verify-") as folder:
        found = verify(recipe, Path(folder), options.compared_steps)
    if options.json:
        print(json.dumps({**asdict(found), "holds": found.holds}, indent=2))
    else:
        console = open_console("plain", sys.stdout)
        for line in lines(found):
            console.say(line)
    return 0 if found.holds else TrainingError.exit_code


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"found {text}; allowed: a whole number of at least 1")
    return int(text)


def lines(found: Comparison) -> Iterator[str]:
    """The differences, number by number."""
    several = f"{found.processes} processes"
    yield f"{'':20} {'1 process':>14} {several:>14} {'difference':>11}"
    for each in found.steps:
        yield f"{each.name:20} {each.alone:14.8g} {each.together:14.8g} {each.apart:11.1e}"
    yield f"{'weights':20} {'':14} {'':14} {found.weights:11.1e}"
    verdict = "rounding explains it" if found.holds else "more than rounding explains: do not train in this layout"
    yield f"{verdict} (allowed: {found.limit:.0e})"

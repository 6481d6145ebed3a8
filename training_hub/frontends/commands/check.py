"""`training-hub check`: what a run would rely on, proved on the recipe's own model and rows, without training."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from training_hub.errors import BackendError, RecipeError, TrainingError
from training_hub.recipe.recipe import Recipe

NO_OUTPUT = "(none)"
"""Stands for `output` where no folder is given; the proofs are then printed only."""


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the proofs as one JSON object")


def run(recipe: Recipe, options: Namespace) -> int:
    """Print every proof; 0 where all hold, else the exit code of TrainingError. Errors of model or data are raised.

    With an output folder the proofs are also written there, as preflight.json. Nothing is trained.
    """
    from training_hub.monitoring.console import open_console
    from training_hub.monitoring.proof_table import as_json, table

    is_json = options.json
    began = time.perf_counter()
    if recipe.output == NO_OUTPUT:
        with tempfile.TemporaryDirectory(prefix="training_hub-check-") as folder:
            proofs = _proofs(recipe, folder, is_json)
    else:
        Path(recipe.output).mkdir(parents=True, exist_ok=True)
        proofs = _proofs(recipe, recipe.output, is_json)
    found = as_json(proofs, time.perf_counter() - began)
    if is_json:
        print(json.dumps(found, indent=2, ensure_ascii=True))
    else:
        console = open_console("plain", sys.stdout)
        for line in (*table(proofs), _summary(found)):
            console.say(line)
    return 0 if found["holds"] else TrainingError.exit_code


def _proofs(recipe: Recipe, folder: str, is_json: bool) -> Any:
    from training_hub.algorithms import engine_of
    from training_hub.backends import Given, find_backend

    # Standard output is the proofs alone where a program reads it.
    style = "off" if is_json else recipe.monitoring.console
    monitoring = recipe.monitoring.model_copy(update={"console": style})
    recipe = recipe.model_copy(update={"output": folder, "monitoring": monitoring})
    engine = find_backend(engine_of(recipe))
    prove = getattr(engine, "check", None)
    if prove is None:
        raise BackendError(f"backend {engine.name!r} has no check(recipe, given); it proves nothing before a run.")
    objections = engine.objections(recipe)
    if objections:
        raise RecipeError(objections)
    return prove(recipe, Given())


def _summary(found: dict[str, Any]) -> str:
    failed = [each["name"] for each in found["proofs"] if each["status"] == "fails"]
    verdict = f"{len(failed)} proofs failed: {', '.join(failed)}" if failed else "every proof holds"
    return f"{verdict} ({found['seconds']:.1f} s)"

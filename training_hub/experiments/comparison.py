"""Saved models side by side on the same rows: scores, answers, and the files that hold them.

OUTPUT/evaluation.json      what was asked, and the scores of each model
OUTPUT/predictions.jsonl    a line for each row: prompt, reference, and what each model said
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from training_hub.backends import Given
from training_hub.errors import RecipeError
from training_hub.evaluation.judging import metrics_of
from training_hub.evaluation.predictions import FILE_NAME, Prediction, Sitting, side_by_side, write_rows
from training_hub.folders import write_json
from training_hub.launch.examining import examine_all, examiner_for, in_processes, processes_for
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import MEASURED_ANYWAY, expanded
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.saved import with_saved
from training_hub.types import Console

RESULT = "evaluation.json"


@dataclass(frozen=True)
class EvaluationResult:
    """What each model, by name, scored and said. output: the folder of the files, None where none were asked for."""

    models: Mapping[str, str]
    sittings: Mapping[str, Sitting]
    output: Path | None = None

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """By name of the model, then of the metric; `rows`, `loss` and `perplexity` among them."""
        return {name: dict(sitting.scores) for name, sitting in self.sittings.items()}

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """One entry for each row that was answered: row, prompt, reference, and by name of the model what it said."""
        said: dict[str, Sequence[Prediction]] = {name: one.predictions for name, one in self.sittings.items()}
        return side_by_side(said)


def compare(
    recipe: Recipe,
    models: Sequence[str],
    given: Given,
    console: Console,
    output: Path | None = None,
    own: Sequence[Callable[..., Any]] = (),
    stream: TextIO | None = None,
) -> EvaluationResult:
    """Let each model answer the rows of the recipe, or `given`, and compare; files in `output`, where it is named.

    In as many processes as the recipe or torchrun's environment says, of which the first writes. stream: where those
    speak that are started. Raises RecipeError listing what is wrong with any of the models before one is loaded.
    """
    engine, layout = examiner_for(recipe), processes_for(recipe)
    recipe = in_processes(recipe, layout)
    asked = [_of(recipe, path) for path in models]
    problems = [line for one in asked for line in engine.objections(one)]
    problems += _output_problems(output)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    metrics_of(recipe.evaluation.metrics, own)
    named = dict(zip(names_of(models), models, strict=True))
    sittings = examine_all(layout, asked, given, console, own, output, stream)
    result = EvaluationResult(named, dict(zip(named, sittings, strict=True)), output)
    if output is not None and layout.is_first:
        write_files(result, recipe)
    return result


def generates(metrics: Sequence[str], own: Sequence[Any] = ()) -> bool:
    """Whether these metrics need answers: loss and perplexity do not."""
    return bool(own) or any(name not in MEASURED_ANYWAY for name in expanded(metrics))


def names_of(models: Sequence[str]) -> list[str]:
    """A short name for each model: the end of its path, as much of it as tells them apart.

    Raises RecipeError where a model is named twice.
    """
    parts = [Path(model).parts for model in models]
    if len({*parts}) < len(parts):
        raise RecipeError(f"--model: found {', '.join(models)}; name each model once.")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]).removeprefix("//") for each in parts]
        if len({*names}) == len(names):
            return names
    return list(models)


def write_files(result: EvaluationResult, recipe: Recipe) -> None:
    """Write evaluation.json and predictions.jsonl into the folder of the result."""
    assert result.output is not None
    result.output.mkdir(parents=True, exist_ok=True)
    content = {
        "data": recipe.data.model_dump(mode="json")["path"],
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "seed": recipe.seed,
        "models": {name: {"path": result.models[name], "scores": scores} for name, scores in result.scores.items()},
    }
    write_json(result.output / RESULT, json.loads(json.dumps(content), parse_constant=lambda _: None))
    if recipe.evaluation.generate:
        write_rows(result.output / FILE_NAME, result.predictions)


def table(result: EvaluationResult) -> Iterator[str]:
    """Lines for a terminal: a row for each score, a column for each model, and what the last has over the first."""
    names = [*result.sittings]
    width = max(12, *(len(name) + 2 for name in names))
    ends = [f"{'change':>{width}}"] if len(names) > 1 else []
    yield "".join([f"{'':<18}", *(f"{name:>{width}}" for name in names), *ends])
    for metric in result.scores[names[0]]:
        values = [scores[metric] for scores in result.scores.values()]
        change = [f"{values[-1] - values[0]:>+{width}.4g}"] if len(names) > 1 and metric != "rows" else []
        yield "".join([f"{metric:<18}", *(f"{_shown(value):>{width}}" for value in values), *change])


def _shown(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value == int(value) and abs(value) >= 2
        else f"{value:.4g}"
        if math.isfinite(value)
        else str(value)
    )


def _of(recipe: Recipe, model: str) -> Recipe:
    """The recipe with `model`, and its rows all to be answered: none set aside, dropped or watched."""
    rows = {"validation": None, "validation_fraction": 0.0, "deduplicate": False}
    return with_saved(recipe, model).model_copy(
        update={
            "data": recipe.data.model_copy(update=rows),
            "evaluation": recipe.evaluation.model_copy(update={"watch": None}),
        }
    )


def _output_problems(output: Path | None) -> list[str]:
    if output is None or not RunFolder(output).recipe.exists():
        return []
    return [
        f"output: {output} holds a run, whose {FILE_NAME} would be lost. Name another folder, such as {output}/eval."
    ]

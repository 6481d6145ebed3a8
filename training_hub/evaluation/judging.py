"""The table of metrics by name, and a user's own function among them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from training_hub.errors import DataError, HubError, RecipeError
from training_hub.evaluation.texts import (
    Score,
    Scored,
    Texts,
    accuracy,
    bleu,
    chrf,
    exact_match,
    normalized_match,
    rouge,
    token_f1,
)
from training_hub.recipe.evaluation import LIVE, MEASURED_ANYWAY, expanded, is_own_function, own_name

SHOWN_PROBLEMS = 5
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Metric:
    """A named score. package: what it needs beside this package."""

    name: str
    score: Score
    package: str = ""


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        one.name: one
        for one in (
            Metric("exact_match", exact_match),
            Metric("normalized_match", normalized_match),
            Metric("accuracy", accuracy),
            Metric("f1", token_f1),
            Metric("bleu", bleu, "sacrebleu"),
            Metric("chrf", chrf, "sacrebleu"),
            *(Metric(kind, rouge(kind), "rouge_score") for kind in ("rouge1", "rouge2", "rougeL")),
        )
    }
)
"""The metrics by name; a new one is an entry here and a name in `recipe/evaluation.py`."""


def objections(names: Sequence[str]) -> list[str]:
    """Why these metrics cannot be computed here: packages that are missing, functions that cannot be had."""
    found = []
    for name in expanded(names):
        package = METRICS[name].package if name in METRICS else ""
        if package and importlib.util.find_spec(package) is None:
            distribution = package.replace("_", "-")
            found.append(
                f"evaluation.metrics: {name} needs {distribution}, which is not installed: "
                "pip install 'training-hub[eval]', or leave the metric out."
            )
        elif is_own_function(name) and not name.startswith(LIVE):
            try:
                find_function(name)
            except RecipeError as error:
                found += error.problems
    return found


def metrics_of(names: Sequence[str], own: Sequence[Callable[..., Any]] = ()) -> list[Metric]:
    """The metrics of these names, and functions of the user's; `live:NAME` is the one of `own` with that name.

    Raises RecipeError where one cannot be had.
    """
    handed_over = {f"{LIVE}{name_of(one)}": one for one in own}
    missing = [name for name in names if name.startswith(LIVE) and name not in handed_over]
    problems = [
        f"evaluation.metrics: {name} is a function that was handed over from Python, and no file can name it. Hand it "
        "over again, or write package.module:function or file.py:function."
        for name in missing
    ]
    problems += objections(names)
    if problems:
        raise RecipeError(problems)
    found = []
    for name in (each for each in expanded(names) if each not in MEASURED_ANYWAY):
        function = handed_over.pop(name) if name in handed_over else None
        is_ours = name in METRICS
        found.append(METRICS[name] if is_ours else Metric(own_name(name), own_score(function or find_function(name))))
    return found + [Metric(name_of(one), own_score(one)) for one in handed_over.values()]


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called in results."""
    return str(getattr(function, "__name__", type(function).__name__))


def judge(texts: Texts, metrics: Sequence[Metric]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Scores of the whole by name, and for each row its own."""
    scored = {metric.name: metric.score(texts) for metric in metrics}
    rows = [{name: each[row] for name, (_, each) in scored.items()} for row in range(len(texts.answers))]
    return {name: whole for name, (whole, _) in scored.items()}, rows


def find_function(path: str) -> Callable[..., Any]:
    """The function at `path`: package.module:name, package.module.name, or a file: metrics/mine.py:name.

    Raises RecipeError where there is none.
    """
    module_name, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    try:
        module = _file_module(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        function = getattr(module, name)
    except Exception as error:  # a module of the user's can raise anything while it is imported
        raise RecipeError(
            f"evaluation.metrics: {path}: cannot be imported: {type(error).__name__}: {error}. Write "
            "package.module:function or file.py:function."
        ) from error
    if not callable(function):
        raise RecipeError(f"evaluation.metrics: {path}: found a {type(function).__name__}; a function is wanted.")
    return function


def _file_module(path: str) -> ModuleType:
    file = Path(path).expanduser()
    spec = importlib.util.spec_from_file_location(f"training_hub_own_metrics_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look their module up
    spec.loader.exec_module(module)
    return module


def own_score(function: Callable[..., Any]) -> Score:
    """A metric of the user's function(answer, reference), which gives a number for each row; the whole is their mean.

    A function with a parameter `prompt` is given that too. Raises DataError naming the rows at which it raised, or gave
    no finite number.
    """
    takes_prompt = "prompt" in inspect.signature(function).parameters

    def score(texts: Texts) -> Scored:
        rows, problems = [], []
        for row, (answer, reference) in enumerate(zip(texts.answers, texts.references, strict=True)):
            more = {"prompt": texts.prompts[row]} if takes_prompt else {}
            try:
                rows.append(_number(function(answer, reference, **more)))
            except HubError:
                raise
            except Exception as error:
                problems.append(_told(function, texts, row, error))
        if problems:
            more_line = f"and {len(problems) - SHOWN_PROBLEMS:,} more problems"
            raise DataError(problems[:SHOWN_PROBLEMS] + ([more_line] if len(problems) > SHOWN_PROBLEMS else []))
        return sum(rows) / len(rows), rows

    return score


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise TypeError(f"gave {value!r}; a number is wanted")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"gave {number}; a finite number is wanted")
    return number


def _told(function: Callable[..., Any], texts: Texts, row: int, error: Exception) -> str:
    where = texts.origins[row] if texts.origins else f"row {row + 1}"
    said, wanted = (ascii(text[:SHOWN_CHARACTERS]) for text in (texts.answers[row], texts.references[row]))
    what = f"{type(error).__name__}: {error}"
    return f"metric {name_of(function)}: {where}: {what}. The answer was {said}, the reference {wanted}."

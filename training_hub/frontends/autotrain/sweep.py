"""A sweep: the same run with other values of some parameters, chosen one after the other, and the best of them.

Each trial is a run of its own in a folder of the project. The choice follows from the seed and from what came out of
the trials before, so that a sweep that is started again takes the finished ones as they are and goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.errors import RecipeError, TrainingError
from training_hub.folders import write_json
from training_hub.frontends.autotrain.meaning import Name, asked
from training_hub.frontends.autotrain.params import LLMTrainingParams, unknown_parameter
from training_hub.frontends.autotrain.run import TrainedModel, recipe_of, run
from training_hub.recipe.translate import shown

METRICS = {"eval_loss": "validation_loss", "eval_perplexity": "validation_perplexity", "train_loss": "loss"}
"""Names that transformers has for metrics, to ours."""

NUMBERS = ("uniform", "loguniform", "int")
EXAMPLE = '{"lr": {"type": "loguniform", "low": 1e-5, "high": 1e-3}, "batch_size": [4, 8]}'
SWEEP = ("use_sweep", "sweep_backend", "sweep_n_trials", "sweep_metric", "sweep_direction", "sweep_params")


@dataclass(frozen=True)
class Range:
    """The values that a parameter may take: `values`, or numbers from low to high."""

    kind: str
    low: float = 0
    high: float = 0
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Trial:
    """What a trial tried and what came of it; value is None where it failed, and `problem` says why."""

    folder: str
    params: dict[str, Any]
    value: float | None
    problem: str = ""


def sweep(config: LLMTrainingParams, write: Name = str) -> TrainedModel:
    """Run all trials, write sweep.json into the project, and give the model of the best.

    A trial whose loss is not finite counts as failed, and the sweep goes on. Raises RecipeError for what is wrong in
    any trial, before the first begins, and TrainingError where no trial ended well.
    """
    space = space_of(config, write)
    problems = _problems(config, space, write)
    if problems:
        raise RecipeError(problems)
    for params in _extremes(space):
        recipe_of(asked(_of_trial(config, "trial", params), write))
    found = _Trials(config, space, write)
    _study(config, space).optimize(found.run_one, n_trials=_count(config, space), catch=(TrainingError,))
    if found.best is None:
        raise TrainingError(f"sweep: none of {len(found.trials)} trials ended well; {found.trials[-1].problem}")
    value, trained = found.best
    found.console.say(f"sweep: best {config.sweep_metric} {value:.6g} in {trained.result.output_dir}")
    return trained


class _Trials:
    """The trials so far, and the best of them; optuna calls `run_one`."""

    def __init__(self, config: LLMTrainingParams, space: Mapping[str, Range], write: Name):
        from training_hub.monitoring.console import open_console

        self.config, self.space, self.write = config, space, write
        self.console = open_console()
        self.trials: list[Trial] = []
        self.best: tuple[float, TrainedModel] | None = None
        self._sign = 1 if config.sweep_direction == "minimize" else -1

    def run_one(self, chosen: Any) -> float:
        """What decides, of a trial with the values that are chosen. Raises TrainingError where it failed."""
        params = {name: _suggest(chosen, name, one) for name, one in self.space.items()}
        folder = f"trial-{len(self.trials) + 1}"
        tried = ", ".join(f"{name} {value}" for name, value in params.items())
        self.console.say(f"sweep: {folder} of {_count(self.config, self.space)}: {tried}")
        try:
            trained = run(asked(_of_trial(self.config, folder, params), self.write))
            value = _value(self.config, trained, self.write)
        except TrainingError as error:
            self._note(Trial(folder, params, None, str(error)))
            self.console.say(f"sweep: {folder} failed: {error.problems[0]}")
            raise
        if self.best is None or self._sign * value < self._sign * self.best[0]:
            self.best = value, trained
        self._note(Trial(folder, params, value))
        return value

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        content = {
            "metric": self.config.sweep_metric,
            "direction": self.config.sweep_direction,
            "best": self.best[1].result.output_dir.name if self.best else None,
            "trials": [vars(trial) for trial in self.trials],
        }
        write_json(Path(self.config.project_name or ".") / "sweep.json", content)


def space_of(config: LLMTrainingParams, write: Name = str) -> dict[str, Range]:
    """What is tried, by parameter. Without sweep_params: learning rates from a tenth to ten times lr."""
    given: Any = config.sweep_params
    name = write("sweep_params")
    if given is None:
        return {"lr": Range("loguniform", config.lr / 10, config.lr * 10)}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise RecipeError(f"{name}: not JSON: {error}. Write {EXAMPLE}") from None
    if not isinstance(given, Mapping) or not given:
        raise RecipeError(f"{name}: found {shown(given)}; parameters with their values are wanted: {EXAMPLE}")
    lines = [line for key, one in given.items() if (line := _range_problem(key, one))]
    if lines:
        raise RecipeError([f"{name}: {line}" for line in lines])
    return {key: _range(one) for key, one in given.items()}


def _range_problem(name: str, given: Any) -> str:
    if name not in LLMTrainingParams.model_fields:
        return unknown_parameter(name)
    if name in (*SWEEP, "project_name", "overrides", "data_path"):
        return f"{name}: is the same in all trials."
    if isinstance(given, list) and given:
        return ""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "categorical" and isinstance(given.get("values"), list) and given["values"]:
        return ""
    numbers = [given.get(end) for end in ("low", "high")] if kind in NUMBERS else []
    if len(numbers) == 2 and all(isinstance(one, (int, float)) and math.isfinite(one) for one in numbers):
        return "" if numbers[0] < numbers[1] else f"{name}: low {numbers[0]} is not below high {numbers[1]}."
    return f"{name}: found {shown(given)}; a list, or a type of {', '.join(NUMBERS)} with low and high: {EXAMPLE}"


def _range(given: Any) -> Range:
    if isinstance(given, list) or given["type"] == "categorical":
        return Range("categorical", values=tuple(given if isinstance(given, list) else given["values"]))
    return Range(given["type"], given["low"], given["high"])


def _problems(config: LLMTrainingParams, space: Mapping[str, Range], write: Name) -> list[str]:
    from importlib.util import find_spec

    found = []
    if find_spec("optuna") is None:
        found.append(
            f"{write('use_sweep')}: optuna is not installed: pip install 'training-hub[sweep]', or leave it out."
        )
    if config.sweep_backend == "grid" and any(one.kind in NUMBERS for one in space.values()):
        found.append(
            f'{write("sweep_backend")}: a grid needs a list of values for each parameter: {{"lr": [1e-5, 1e-4]}}'
        )
    if config.sweep_n_trials < 1:
        found.append(
            f"{write('sweep_n_trials')}: found {config.sweep_n_trials}; allowed: a whole number of at least 1."
        )
    return found


def _extremes(space: Mapping[str, Range]) -> list[dict[str, Any]]:
    """Trials that have each value of a list and both ends of a range, so that what is wrong is found at once."""
    choices = {name: list(one.values) or [_number(one, one.low), _number(one, one.high)] for name, one in space.items()}
    most = max(len(values) for values in choices.values())
    return [{name: values[number % len(values)] for name, values in choices.items()} for number in range(most)]


def _number(one: Range, value: float) -> float:
    return int(value) if one.kind == "int" else value


def _of_trial(config: LLMTrainingParams, folder: str, params: Mapping[str, Any]) -> LLMTrainingParams:
    own = {name: getattr(config, name) for name in config.model_fields_set if name not in SWEEP}
    project = {} if config.project_name is None else {"project_name": str(Path(config.project_name) / folder)}
    trial = LLMTrainingParams(**{**own, **project, **params})
    measures = METRICS.get(config.sweep_metric, config.sweep_metric) != "loss"
    is_apart = trial.valid_split or trial.valid_path or "data.validation_fraction" in trial.overrides
    if measures and not is_apart and not trial.use_enhanced_eval and trial.early_stopping_patience is None:
        trial.overrides = {**trial.overrides, "data.validation_fraction": 0.1}
    return trial


def _value(config: LLMTrainingParams, trained: TrainedModel, write: Name) -> float:
    name = METRICS.get(config.sweep_metric, config.sweep_metric)
    if name not in trained.metrics:
        known = ", ".join([*METRICS, *trained.metrics])
        raise RecipeError(f"{write('sweep_metric')}: no run measured {config.sweep_metric!r}; known: {known}.")
    value = float(trained.metrics[name])
    if not math.isfinite(value):
        raise TrainingError(f"{config.sweep_metric} is {value}")
    return value


def _study(config: LLMTrainingParams, space: Mapping[str, Range]) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    if config.sweep_backend == "grid":
        sampler: Any = optuna.samplers.GridSampler(
            {name: list(one.values) for name, one in space.items()}, seed=config.seed
        )
    elif config.sweep_backend == "random":
        sampler = optuna.samplers.RandomSampler(seed=config.seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=config.seed)
    return optuna.create_study(direction=config.sweep_direction, sampler=sampler)


def _count(config: LLMTrainingParams, space: Mapping[str, Range]) -> int:
    """How many trials there are; of a grid no more than it has points."""
    if config.sweep_backend == "grid":
        return min(config.sweep_n_trials, math.prod(len(one.values) for one in space.values()))
    return config.sweep_n_trials


def _suggest(chosen: Any, name: str, one: Range) -> Any:
    if one.kind == "categorical":
        return chosen.suggest_categorical(name, list(one.values))
    if one.kind == "int":
        return chosen.suggest_int(name, int(one.low), int(one.high))
    return chosen.suggest_float(name, one.low, one.high, log=one.kind == "loguniform")

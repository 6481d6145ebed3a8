"""Continual learning, measured: a sequence of tasks under several methods and seeds, every task scored after each.

    OUTPUT/base.json                           scores of the model before the first task
    OUTPUT/METHOD/seed-S/1-TASK/               a run folder like any other; the next run begins from its final model
    OUTPUT/METHOD/seed-S/1-TASK/scores.json    scores of that model on every task
    OUTPUT/continual.json, .csv, .html         all of it

Going on after a stop is running the same again: a run that is finished, and scores of the same model on the same rows,
are taken as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from training_hub.algorithms import engine_of
from training_hub.backends import Backend, Scorer, find_backend
from training_hub.data.sources import open_path
from training_hub.errors import BackendError, DataError, RecipeError
from training_hub.evaluation.metrics import average_accuracy, backward_transfer, forgetting, new_task_score
from training_hub.folders import MANIFEST, write_json
from training_hub.launch import run
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.load import Layer, build, layer_of, merge
from training_hub.types import Console, TrainResult

NAME = re.compile(r"[A-Za-z0-9][\w-]*")
NOT_GIVEN = "(none)"  # what a command line has in the place of data.path
SCORES = ("exact_match", "loss")
REPLAYED = 0.01
"""Share of each earlier task's rows that replay shows again: the 1 % of Scialom et al. 2022, arXiv:2205.12393."""


@dataclass(frozen=True)
class Task:
    """One task: a name, and the rows that train and test it, as data.path names them."""

    name: str
    train: str
    test: str


@dataclass(frozen=True)
class Method:
    """One way to learn a task after others.

    settings: by recipe path, over those that all methods share. replayed: rows of each earlier task that an epoch shows
    again, as a share of them; every epoch takes others.
    """

    name: str
    settings: Mapping[str, Any]
    replayed: float = 0.0


_OSFT = {"algorithm": "osft", "osft.unfreeze_rank_ratio": 0.3}

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        one.name: one
        for one in (
            Method("full", {"algorithm": "sft"}),
            Method("osft", _OSFT),
            Method("osft-core", {**_OSFT, "osft.form": "core"}),
            Method("osft-frozen", {**_OSFT, "osft.others": "freeze"}),
            Method("osft-carry", {**_OSFT, "osft.carry": True}),
            Method("replay", {"algorithm": "sft"}, REPLAYED),
            Method("lora", {"algorithm": "lora_sft", "lora.merge": True}),
        )
    }
)
"""The methods by name; a new one is an entry. lora: a new adapter for each task, merged before the next begins, so that
like with the others it begins from all the earlier ones left in an ordinary model, and has as much room as they had."""


@dataclass(frozen=True)
class Study:
    """What is compared: `recipe` holds what all runs share; its data, seed and output give way to those of each run.

    score: what the matrix holds. exact_match: the share of test rows answered as the row says, letter by letter.
    loss: minus the mean loss on the answers in nats, which needs no generation and moves long before answers do.
    """

    recipe: Recipe
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    score: str = "exact_match"


@dataclass(frozen=True)
class Course:
    """What one method did with one seed.

    scores: A[i][j], the score on task j after task i, higher is better. losses: the same of the mean loss. watch: the
    loss on evaluation.watch before the first task and after each, empty where nothing is watched.
    """

    method: str
    seed: int
    scores: tuple[tuple[float, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    watch: tuple[float, ...]
    seconds: float = 0.0

    def measures(self) -> dict[str, float]:
        """The matrix in a few numbers, by name."""
        found = {
            "average_accuracy": average_accuracy(self.scores),
            "backward_transfer": backward_transfer(self.scores),
            "forgetting": forgetting(self.scores),
            "new_task_score": new_task_score(self.scores),
        }
        return found | ({"watch_rise": self.watch[-1] - self.watch[0]} if self.watch else {})


@dataclass(frozen=True)
class ContinualResult:
    """All courses of a study, and the score of the model they began from on each task."""

    output: Path
    tasks: tuple[str, ...]
    score: str
    base: tuple[float, ...]
    courses: tuple[Course, ...]

    def methods(self) -> list[str]:
        return list(dict.fromkeys(one.method for one in self.courses))

    def of(self, method: str) -> list[Course]:
        return [one for one in self.courses if one.method == method]


def continual(study: Study) -> ContinualResult:
    """Train and score all courses of a study.

    Raises RecipeError for settings and DataError for rows that are not there, before anything is trained.
    """
    engine = find_backend(engine_of(study.recipe))
    if not isinstance(engine, Scorer):
        raise BackendError(f"backend {engine.name!r} scores no models: it has no method score(recipe, console).")
    _refuse(study)
    _refuse_settings(study, find_backend(engine_of(study.recipe)))
    _refuse_missing_rows(study)
    console = open_console(study.recipe.monitoring.console)
    output = Path(study.recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    base = scores_of(study, engine, study.recipe.model.path, output / "base.json", console)
    console.say(f"continual: before the first task: {_told(study, base)}")
    courses = tuple(course(study, engine, method, seed, console) for seed in study.seeds for method in study.methods)
    names = tuple(task.name for task in study.tasks)
    return ContinualResult(output, names, study.score, _scores(base, study.score), courses)


def course(study: Study, engine: Scorer, method: Method, seed: int, console: Console) -> Course:
    """One method with one seed: each task trained from where the one before ended, and all tasks scored after each."""
    model, found, results = study.recipe.model.path, [], []
    for step, task in enumerate(study.tasks):
        recipe = recipe_of(study, method, seed, step, model)
        results.append(run(recipe))
        model = _whole_model(results[-1], recipe) or model  # a run that its watch stopped may have none to go on from
        found.append(scores_of(study, engine, model, Path(recipe.output) / "scores.json", console))
        console.say(f"continual: {method.name}, seed {seed}, after {task.name}: {_told(study, found[-1])}")
    return Course(
        method.name,
        seed,
        tuple(_scores(one, study.score) for one in found),
        tuple(tuple(scores["loss"] for scores in one.values()) for one in found),
        _watched(results),
        sum(one.seconds for one in results),
    )


def _whole_model(result: TrainResult, recipe: Recipe) -> str | None:
    """What a run leaves for the next: its final model, or the one that its adapter was merged into."""
    if result.model_path is None:
        return None
    return str(RunFolder(result.output_dir).merged if recipe.lora.merge else result.model_path)


def recipe_of(study: Study, method: Method, seed: int, step: int, model: str) -> Recipe:
    """The recipe of the run that learns task `step` from `model`. Raises RecipeError."""
    task, earlier = study.tasks[step], study.tasks[:step] if method.replayed else ()
    again = [{"path": one.train, "weight": method.replayed} for one in earlier]
    own = {
        "model.path": model,
        "data.path": [{"path": task.train}, *again] if again else task.train,
        "seed": seed,
        "output": str(Path(study.recipe.output) / method.name / f"seed-{seed}" / f"{step + 1}-{task.name}"),
        "model.revision": study.recipe.model.revision if step == 0 else None,
    }
    settings = layer_of(method.settings, f"the settings of {method.name}")
    merged = merge(layer_of(study.recipe.model_dump(mode="python")), settings, Layer(own))
    return build(merged.values, spelled=merged.spelled, problems=merged.problems)


def scores_of(study: Study, engine: Scorer, model: str, file: Path, console: Console) -> dict[str, dict[str, float]]:
    """Scores of `model` by task; from `file` where it holds those of this model on these rows, else written there."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {}
    for task in study.tasks:
        key = {"model": _digest(Path(model) / MANIFEST) or model, "rows": task.test, "digest": _digest(Path(task.test))}
        known = before.get(task.name, {})
        if {name: known.get(name) for name in key} == key and study.score in known.get("scores", {}):
            found[task.name] = known
            continue
        generates = study.score == "exact_match"
        found[task.name] = {**key, "scores": engine.score(_test(study, task, model), console, generates=generates)}
        write_json(file, {**before, **found})
    return {name: entry["scores"] for name, entry in found.items()}


def _test(study: Study, task: Task, model: str) -> Recipe:
    """A recipe that names a model and the rows that test it."""
    own = {"path": task.test, "validation": None, "validation_fraction": 0.0, "deduplicate": False}
    shared = study.recipe
    return shared.model_copy(
        update={
            "model": shared.model.model_copy(update={"path": model}),
            "data": shared.data.model_copy(update=own),
            "evaluation": shared.evaluation.model_copy(update={"watch": None}),
        }
    )


def _digest(file: Path) -> str | None:
    """The sha256 of a file; None for what is none, such as a folder or a hub name, which is then known by its name."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _scores(found: Mapping[str, Mapping[str, float]], name: str) -> tuple[float, ...]:
    """One number per task, higher is better."""
    return tuple(-scores["loss"] if name == "loss" else scores[name] for scores in found.values())


def _watched(results: Sequence[TrainResult]) -> tuple[float, ...]:
    looks = [one.metrics["watch_loss"] for one in results if "watch_loss" in one.metrics]
    return (results[0].metrics["watch_loss_before"], *looks) if len(looks) == len(results) else ()


def _told(study: Study, scores: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {entry[study.score]:.3f}" for name, entry in scores.items())


def _refuse(study: Study) -> None:
    """Raise RecipeError with all that is wrong with the study itself."""
    problems = []
    for what, names in (("tasks", [one.name for one in study.tasks]), ("methods", [one.name for one in study.methods])):
        if not names:
            problems.append(f"{what}: none given; a study needs at least one.")
        problems += [f"{what}: {name!r} is given twice." for name in names if names.count(name) > 1]
        # They name folders.
        wrong = [name for name in names if not NAME.fullmatch(name)]
        problems += [f"{what}: {name!r} is no name; allowed: letters, digits, - and _." for name in wrong]
    if not study.seeds or len({*study.seeds}) < len(study.seeds):
        problems.append(f"seeds: found {list(study.seeds)}; give at least one, and each once.")
    if study.score not in SCORES:
        problems.append(f"score: found {study.score!r}; allowed: {', '.join(SCORES)}.")
    if study.recipe.algorithm != "sft":
        problems.append(f"algorithm: found {study.recipe.algorithm!r}; the methods say what is run. Leave it out.")
    if study.recipe.data.path not in (None, NOT_GIVEN):
        problems.append(f"data.path: found {study.recipe.data.path!r}; the tasks name the rows. Leave it out.")
    if problems:
        raise RecipeError(problems)


def _refuse_settings(study: Study, engine: Backend) -> None:
    """Raise RecipeError with what speaks against the runs of each method."""
    problems = []
    for method in study.methods:
        for seed, step in itertools.product(study.seeds, range(len(study.tasks))):
            recipe = recipe_of(study, method, seed, step, study.recipe.model.path)
        problems += engine.objections(recipe)
        if recipe.algorithm == "lora_sft" and not recipe.lora.merge:
            problems.append(
                f"{method.name}: lora.merge: false leaves only an adapter, and the next task begins from a whole "
                "model. Leave it out."
            )
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def _refuse_missing_rows(study: Study) -> None:
    problems = []
    for named in dict.fromkeys(path for task in study.tasks for path in (task.train, task.test)):
        try:
            open_path(named, study.recipe.data.split, study.recipe.data.max_row_bytes)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)


def method_of(name: str, settings: Mapping[str, Any] = MappingProxyType({}), replayed: float | None = None) -> Method:
    """The method called `name`, with more settings by recipe path. Raises RecipeError for one that is not known."""
    if name not in METHODS:
        raise RecipeError(f"methods: {name!r} is not known; known: {', '.join(METHODS)}.")
    known = METHODS[name]
    share = known.replayed if replayed is None or not known.replayed else replayed
    return Method(name, {**known.settings, **settings}, share)

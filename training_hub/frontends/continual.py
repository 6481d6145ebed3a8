"""`continual(...)`: a sequence of tasks under several methods, from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training_hub.frontends.dialects import recipe_from
from training_hub.recipe.load import Layer, layer_of, merge

if TYPE_CHECKING:
    from training_hub.experiments.continual import ContinualResult


def continual(
    model_path: str | os.PathLike[str],
    tasks: Mapping[str, tuple[str | os.PathLike[str], str | os.PathLike[str]]],
    ckpt_output_dir: str | os.PathLike[str],
    methods: Sequence[str] = ("full", "osft", "osft-core", "replay"),
    seeds: Sequence[int] = (0,),
    score: str = "exact_match",
    overrides: Mapping[str, Any] | None = None,
    overrides_for: Mapping[str, Mapping[str, Any]] | None = None,
) -> ContinualResult:
    """Train a model on tasks one after the other, by several methods, and measure what each method forgets.

    model_path: what every method begins from. tasks: name -> (rows that train it, rows that test it), in the order of
        learning. ckpt_output_dir: one run folder for each method, seed and task, and continual.json, .csv and .html.
    methods: full (SFT), osft, osft-core, osft-frozen (what is not protected stays as it is), osft-carry (protection
        carried over the tasks), replay (SFT with 1 % of the rows of each earlier task in every epoch), lora (a new
        adapter for each task, merged into the weights before the next).
    seeds: each runs every method.
    score: "exact_match" generates an answer to each test row, and counts those that are right letter by letter; "loss"
        is minus the mean loss on the answers in nats, which is cheaper and moves earlier.
    overrides: settings of all runs by recipe path, {"optimizer.lr": 1e-4}; overrides_for: those of one method,
        {"osft": {"osft.unfreeze_rank_ratio": 0.5}}. With {"evaluation.watch": FILE} the loss on general rows is
        followed too.

    Returns a ContinualResult: `courses`, each with its matrix `scores` and `measures()`. What is finished in the output
    folder is not run again. Raises RecipeError listing what is wrong before anything is trained.
    """
    from training_hub.errors import RecipeError
    from training_hub.experiments.continual import Study, Task, method_of
    from training_hub.experiments.continual import continual as run_study
    from training_hub.experiments.continual_files import write_files

    own = Layer({"model.path": os.fspath(model_path), "output": os.fspath(ckpt_output_dir)})
    layer = merge(layer_of(overrides, "overrides"), own)
    recipe = recipe_from(layer, algorithm="sft", backend="torch", live=("data.path",))
    special = {name: layer_of(settings, f"overrides_for {name}") for name, settings in (overrides_for or {}).items()}
    problems = [
        f"overrides_for: {name!r} is not among methods {list(methods)}." for name in special if name not in methods
    ]
    problems += [line for one in special.values() for line in one.problems]
    if problems:
        raise RecipeError(problems)
    chosen = tuple(method_of(name, special[name].values if name in special else {}) for name in methods)
    rows = tuple(Task(name, os.fspath(train), os.fspath(test)) for name, (train, test) in tasks.items())
    result = run_study(Study(recipe, rows, chosen, tuple(seeds), score))
    write_files(result)
    return result

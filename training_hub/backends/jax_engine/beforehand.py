"""What is refused before a weight is read: going on with another run's checkpoint, and a disk that is too small."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from training_hub.backends.jax_engine.checkpoints import Checkpoints, shapes_in
from training_hub.backends.jax_engine.freezing import tables_of
from training_hub.backends.jax_engine.materials import Materials
from training_hub.backends.shared.checkpoint_folders import RECIPE, facts_of, newest_valid
from training_hub.backends.shared.disk import BESIDE_TENSORS, free_bytes, room_for, saves_ahead
from training_hub.backends.shared.sameness import Shapes, changed_facts, changed_shapes, model_facts, other_engine
from training_hub.data.feed import Feed
from training_hub.errors import CheckpointError, DiskError
from training_hub.recipe import Recipe
from training_hub.recipe.folder import differences
from training_hub.recipe.load import load_file
from training_hub.recipe.sections import Optimizer
from training_hub.types import Console

STATES = {"AdamW": 2, "Adam": 2, "NAdam": 2, "RAdam": 2, "SGD": 0, "RMSprop": 1, "Adagrad": 1, "Lion": 1}
"""Numbers that each optimizer keeps of each number of a weight, without momentum; of others `kept_numbers` tells."""


def numbers_of(materials: Materials) -> dict[str, Any]:
    """What decides the numbers of a run beside its recipe: data, tokenizer and the model's config."""
    return {
        "data_fingerprint": materials.prepared.train.fingerprint,
        "tokenizer_fingerprint": materials.tokenizer.fingerprint,
        "model_config": model_facts(materials.config),
    }


def starting_step(recipe: Recipe, materials: Materials, trained: Shapes, feed: Feed, console: Console) -> int | None:
    """The step of the newest whole checkpoint in the output folder, after which the run goes on; None: it begins.

    trained: shapes of what trains. Raises CheckpointError, line by line, where it is another run's, and DiskError where
    the disk is too small.
    """
    checkpoints = Checkpoints(Path(recipe.output) / "checkpoints")
    step = newest_valid(checkpoints.root, console.say)
    if step is not None:
        refuse_another_run(recipe, materials, trained, checkpoints.folder(step))
    _check_room(recipe, materials, trained, feed, step or 0, len(checkpoints.steps()))
    return step


def refuse_another_run(recipe: Recipe, materials: Materials, trained: Shapes, folder: Path) -> None:
    """Raise CheckpointError where this checkpoint was not written by this run."""
    changed = [
        *differences(load_file(folder / RECIPE), recipe),
        *other_engine(facts_of(folder), recipe, "jax"),
        *changed_facts(facts_of(folder), numbers_of(materials)),
        *changed_shapes(shapes_in(folder), trained),
    ]
    if changed:
        raise CheckpointError(
            [
                *changed,
                f"{folder}: recipe, data, tokenizer or model changed since it was written, so the run cannot go on as "
                "if unbroken. Restore them, or set checkpoint.resume: restart.",
            ]
        )


def kept_numbers(settings: Optimizer, trained: Shapes, tables: Collection[str]) -> int:
    """How many numbers the optimizer keeps of weights of these shapes. tables: names of embeddings and the head."""
    return sum(_kept(settings, shape, len(shape) == 2 and name not in tables) for name, shape in trained.items())


def _kept(settings: Optimizer, shape: tuple[int, ...], is_matrix: bool) -> int:
    if settings.name == "Adafactor" and len(shape) > 1:  # sums over rows and columns in place of squares
        return count_of(shape[:-2]) * (shape[-2] + shape[-1])
    if settings.name in ("Adafactor", "Muon"):
        return count_of(shape) * (1 if is_matrix or settings.name == "Adafactor" else 2)
    has_momentum = bool(settings.momentum) and settings.name in ("SGD", "RMSprop")
    return count_of(shape) * (STATES[settings.name] + has_momentum)


def _check_room(recipe: Recipe, materials: Materials, trained: Shapes, feed: Feed, step: int, kept: int) -> None:
    numbers = sum(count_of(shape) for shape in trained.values())
    kept = kept_numbers(recipe.optimizer, trained, tables_of(materials.shape))
    checkpoint = 4 * (numbers + kept) + BESIDE_TENSORS
    asked = recipe.checkpoint
    ahead = saves_ahead(asked.interval, step, feed.total_steps, feed.steps_per_epoch, asked.at_epoch)
    needed = room_for(checkpoint, 4 * numbers if asked.final else 0, ahead, kept, asked)
    problem = needed.objection(Path(recipe.output), free_bytes(Path(recipe.output)))
    if problem is not None:
        raise DiskError(problem)


def count_of(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count

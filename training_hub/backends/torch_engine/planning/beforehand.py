"""What is refused before a weight is read: going on with another run's checkpoint, and a disk that cannot hold the run.

Both follow from the shapes of the model, which its config gives, and from what the newest checkpoint noted of its run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training_hub.algorithms import find_algorithm
from training_hub.backends.shared.disk import free_bytes, saves_ahead
from training_hub.backends.shared.sameness import changed_facts, changed_shapes, model_facts, other_engine
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.adaptations.holdings import NOTHING, Holdings
from training_hub.backends.torch_engine.loading.model_config import read_blank_model
from training_hub.backends.torch_engine.materials import Materials
from training_hub.backends.torch_engine.planning.plan import feed_settings
from training_hub.backends.torch_engine.planning.room import room
from training_hub.backends.torch_engine.saving.checkpoints import Checkpoints
from training_hub.data.feed import Feed
from training_hub.errors import CheckpointError, DiskError
from training_hub.recipe import Recipe
from training_hub.recipe.folder import differences
from training_hub.recipe.load import load_file
from training_hub.types import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outline:
    """A run as far as it is known without weights. `model`, with what trains attached, may lie on the meta device.

    dtype: what it computes in; original_dtype: what it came in. facts: what its checkpoints note of data and model.
    holdings: what its adaptation holds beside the model.
    """

    recipe: Recipe
    materials: Materials
    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    original_dtype: torch.dtype
    facts: dict[str, Any]
    holdings: Holdings = NOTHING


def outline(recipe: Recipe, materials: Materials, device: torch.device, dtype: torch.dtype) -> Outline:
    """The run that the recipe asks for, from its model's config alone."""
    blank, original_dtype = read_blank_model(recipe.model, recipe.qat)
    facts = facts_of(materials, blank)
    adaptation = ADAPTATIONS[find_algorithm(recipe.algorithm).adaptation](recipe)
    model = adaptation.attach(blank)
    adaptation.expect_steps(_feed(recipe, materials, device).total_steps)
    return Outline(recipe, materials, model, device, dtype, original_dtype, facts, adaptation.holdings())


def starting_step(run: Outline, console: Console) -> int | None:
    """The step of the newest whole checkpoint in the output folder, after which the run goes on; None: it begins.

    Raises CheckpointError, line by line, where that is another run's, and DiskError where the disk is too small.
    """
    checkpoints = Checkpoints(Path(run.recipe.output) / "checkpoints")
    step = checkpoints.newest_valid(console.say)
    if step is not None:
        refuse_another_run(run, checkpoints, step)
    check_room(run, step or 0, len(checkpoints.steps()))
    return step


def refuse_another_run(run: Outline, checkpoints: Checkpoints, step: int) -> None:
    """Raise CheckpointError where checkpoint `step` was not written by this run."""
    folder = checkpoints.folder(step)
    shapes = {name: tuple(weight.shape) for name, weight in run.model.named_parameters()}
    trained = {name: shapes[name] for name, weight in run.model.named_parameters() if weight.requires_grad}
    # What an adaptation saves beside the model's own weights follows from these and the recipe.
    saved = {name: shape for name, shape in checkpoints.shapes(step).items() if name in shapes}
    changed = [
        *differences(load_file(folder / "recipe.yaml"), run.recipe),
        *other_engine(checkpoints.facts(step), run.recipe, "torch"),
        *changed_facts(checkpoints.facts(step), run.facts),
        *changed_shapes(saved, trained),
    ]
    if changed:
        raise CheckpointError(
            [
                *changed,
                f"{folder}: recipe, data, tokenizer or model changed since it was written, so the run cannot go on as "
                "if unbroken. Restore them, or set checkpoint.resume: restart.",
            ]
        )


def check_room(run: Outline, step: int, kept: int) -> None:
    """Raise DiskError, with the numbers, where the disk cannot hold what the run will surely write after `step`."""
    recipe = run.recipe
    feed = _feed(recipe, run.materials, run.device)
    asked = recipe.checkpoint
    ahead = saves_ahead(asked.interval, step, feed.total_steps, feed.steps_per_epoch, asked.at_epoch)
    wanted = recipe.model.save_dtype
    final_dtype = run.original_dtype if wanted == "auto" else getattr(torch, wanted)
    needed = room(recipe, run.model, run.dtype, final_dtype, ahead, kept, run.holdings)
    problem = needed.objection(Path(recipe.output), free_bytes(Path(recipe.output)))
    if problem is not None:
        raise DiskError(problem)


def _feed(recipe: Recipe, materials: Materials, device: torch.device) -> Feed:
    """The steps of the run, before it is known whether its model can be given packs."""
    store = materials.prepared.train
    return Feed(store, feed_settings(recipe, int(store.lengths.max()), device, recipe.data.packing))


def facts_of(materials: Materials, model: PreTrainedModel) -> dict[str, Any]:
    """What decides the numbers of a run beside its recipe: data, tokenizer, the model's config, and the teacher."""
    teacher = {} if materials.teacher is None else {"teacher_fingerprint": materials.teacher.fingerprint}
    return {
        **teacher,
        "data_fingerprint": materials.prepared.train.fingerprint,
        "tokenizer_fingerprint": materials.tokenizer.fingerprint,
        "model_config": model_facts(model.config),
    }

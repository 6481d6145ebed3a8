"""From a loaded model and its materials to a run at its first step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from training_hub.algorithms import find_algorithm
from training_hub.backends.shared.outcome import versions
from training_hub.backends.shared.watch import Watch
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.adaptations.osft import Osft
from training_hub.backends.torch_engine.adaptations.osft.importance import layer_importance
from training_hub.backends.torch_engine.adaptations.protocol import Adaptation
from training_hub.backends.torch_engine.answers.exam import exam_of
from training_hub.backends.torch_engine.attention import VARLEN
from training_hub.backends.torch_engine.by_source import BySource, sets_of
from training_hub.backends.torch_engine.checkpointing import NONE, checkpoint_layers
from training_hub.backends.torch_engine.compiling import compile_blocks
from training_hub.backends.torch_engine.freezing import Thaw, turns_of
from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.loading.dividing import attach, divide, refuse_broken_model
from training_hub.backends.torch_engine.loading.model import LoadedModel, named
from training_hub.backends.torch_engine.loading.rounding import unrounded
from training_hub.backends.torch_engine.loop import evaluate
from training_hub.backends.torch_engine.materials import Materials, first_lengths
from training_hub.backends.torch_engine.objectives import make_objective
from training_hub.backends.torch_engine.objectives.cross_entropy import cross_entropy
from training_hub.backends.torch_engine.objectives.distillation import Teaching
from training_hub.backends.torch_engine.optim import Masters, Updater
from training_hub.backends.torch_engine.optimizers.library import table_names
from training_hub.backends.torch_engine.planning.beforehand import facts_of
from training_hub.backends.torch_engine.planning.plan import feed_settings
from training_hub.backends.torch_engine.preflight import can_pack
from training_hub.backends.torch_engine.recording import NOT_REPLAYED, Recorder, cuda_graphs
from training_hub.backends.torch_engine.run import Run
from training_hub.backends.torch_engine.saving.checkpoints import Checkpoints
from training_hub.backends.torch_engine.saving.staging import staging_of
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.data.feed import Feed, packs_validation
from training_hub.errors import RecipeError
from training_hub.evaluation.best import Best
from training_hub.recipe import Recipe
from training_hub.types import Console


def assemble(
    recipe: Recipe,
    loaded: LoadedModel,
    materials: Materials,
    device: torch.device,
    dtype: torch.dtype,
    console: Console,
    teaching: Teaching | None = None,
    layout: Layout = WHOLE,
) -> Run:
    """The run at step 0."""
    if not loaded.files:
        refuse_broken_model(recipe, nonfinite_tensors(loaded.model.state_dict()))
    adaptation = ADAPTATIONS[find_algorithm(recipe.algorithm).adaptation](recipe)
    loaded = attach(loaded, adaptation, device, layout.group, console)
    model = loaded.model
    is_decomposed_late = isinstance(adaptation, Osft) and bool(loaded.files)
    if isinstance(adaptation, Osft):
        adaptation.share_work(layout)
    if not is_decomposed_late:
        _begin(adaptation, recipe, loaded, materials, device, console, WHOLE)
    turns = turns_of(model, recipe.freezing)
    if layout.is_divided:
        lengths = first_lengths(materials)
        loaded, layout = divide(layout, loaded, adaptation, recipe, device, dtype, lengths, console)
    if is_decomposed_late:
        _begin(adaptation, recipe, loaded, materials, device, console, layout)
    plain, note = cross_entropy(model, is_split=not recipe.parallelism.disable_loss_parallel)
    with unrounded(model):  # a sum in another order makes other codes
        layout.refuse_other_numbers(model, plain, dtype)
    for line in (*loaded.notes, *([note] if note else [])):
        console.say(f"model: {line}")
    asked = (recipe.data.packing, packs_validation(recipe.data))
    may_pack = any(asked) and can_pack(model, plain, dtype, console)
    if recipe.training.compile:
        console.say(f"model: {compile_blocks(model)}")
    store = materials.prepared.train
    are_split, let_go = recipe.optimizer.state != "full", partial(layout.let_go, model)
    masters = Masters(
        model.named_parameters(), adaptation, are_split=are_split, are_held=layout.is_backward_whole, published=let_go,
        base=loaded.base,
    )  # fmt: skip
    if masters.rounded:
        console.say(f"model: begins from rounded weights, since it has others than its files: {named(masters.rounded)}")
    run = Run(
        recipe=recipe,
        model=model,
        objective=make_objective(recipe, plain, teaching),
        plain=plain,
        adaptation=adaptation,
        updater=Updater(masters, recipe.optimizer, recipe.training.max_norm, table_names(model), layout),
        feed=Feed(store, feed_settings(recipe, int(store.lengths.max()), device, asked[0] and may_pack)),
        validation=materials.prepared.validation,
        checkpoints=Checkpoints(Path(recipe.output) / "checkpoints", recipe.checkpoint.keep_last),
        device=device,
        console=console,
        facts={**facts_of(materials, loaded.model), "versions": versions("torch")},
        best=Best(recipe.evaluation),
        exam=exam_of(recipe, materials),
        thaw=Thaw(model, turns) if turns.interval is not None else None,
        layout=layout,
        staging=staging_of(recipe.checkpoint.async_mode, device),
        packs_validation=asked[1] and may_pack,
        validation_sets=sets_of(materials.prepared, device),
    )
    adaptation.expect_steps(run.feed.total_steps)
    sources = [one["name"] for one in materials.prepared.report["sources"]]
    if len(sources) > 1 and recipe.loss.by_source:
        run.by_source = BySource(sources, store, device)
    if materials.watch is not None:
        run.watch = Watch(materials.watch, recipe.evaluation, partial(evaluate, run))
    return run


def _begin(
    adaptation: Adaptation,
    recipe: Recipe,
    loaded: LoadedModel,
    materials: Materials,
    device: torch.device,
    console: Console,
    layout: Layout,
) -> None:
    """Let the adaptation prepare what depends on the weights of the model, which is divided as `layout` says."""
    if isinstance(adaptation, Osft):
        if recipe.osft.importance and materials.watch is not None:
            adaptation.weigh(layer_importance(loaded.model, materials.watch, device, console, layout))
        adaptation.begin_as_it_came(loaded.base)
    adaptation.begin(console)


def forget_activations(run: Run, how: str) -> None:
    """Checkpoint the activations of the run's layers. Raises RecipeError where the model has no layers that can."""
    if not checkpoint_layers(run.model, how) and how != NONE:
        raise RecipeError(
            f"training.activation_checkpointing: {how}, but the layers of {type(run.model).__name__} have none in "
            "transformers. Write none."
        )


def recorder_of(run: Run) -> Recorder | None:
    """What replays the packs of the run, where it is asked for; says why it cannot be, where it cannot."""
    if not run.recipe.training.cuda_graphs:
        return None
    attention, settings = run.model.config._attn_implementation, run.feed.settings
    reason = f"attention of this architecture is {attention}, which is not for graphs" if attention != VARLEN else ""
    if not settings.is_packed:
        reason = "this architecture does not keep the documents of a pack apart"
    if reason:
        run.console.say(f"{NOT_REPLAYED} {reason}")
        return None
    masters, budget = run.updater.masters, settings.token_budget
    return Recorder(run.model, run.objective, masters, budget, run.device, run.console, cuda_graphs())

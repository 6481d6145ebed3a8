"""A saved model, ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training_hub.algorithms import find_algorithm
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.loading.dividing import attach, divide, load_for
from training_hub.backends.torch_engine.loading.model import choose_device, choose_dtype, load_model
from training_hub.backends.torch_engine.processor import prepare_processor
from training_hub.recipe import Recipe
from training_hub.types import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training_hub.backends.torch_engine.layouts import Layout


def load_saved(recipe: Recipe, live: PreTrainedModel | None = None) -> PreTrainedModel:
    """The model of model.path in evaluation mode, on the device and in the format that a run of it would choose, with
    the adapter of lora.adapter where there is one (recipe/saved.py tells what a folder holds). A `live` model stays in
    the format that it has.

    Raises RecipeError naming what is wrong with the folder.
    """
    device = choose_device()
    prepare_processor(device)
    dtype = choose_dtype(recipe.model.dtype, device) if live is None else next(live.parameters()).dtype
    model = load_model(recipe, device, dtype, live, is_trained=False).model
    if recipe.lora.adapter is not None:
        ADAPTATIONS[find_algorithm(recipe.algorithm).adaptation](recipe).attach(model)
    return model.eval()


def load_saved_together(
    layout: Layout, recipe: Recipe, live: PreTrainedModel | None, lengths: Sequence[int], console: Console
) -> tuple[PreTrainedModel, Layout]:
    """The same by all processes of `layout`, which then holds the model as it says: divided, or whole in each; and the
    layout, which knows more now. lengths: tokens of the first rows.

    Raises RecipeError also where the model cannot be divided so.
    """
    if not layout.is_divided:
        return load_saved(recipe, live), layout
    prepare_processor(layout.device)
    dtype = choose_dtype(recipe.model.dtype, layout.device)
    is_adapted = recipe.lora.adapter is not None
    asked = recipe if is_adapted else recipe.model_copy(update={"algorithm": "sft"})  # nothing will train
    loaded = load_for(layout, asked, layout.device, dtype, live, lengths, console)
    loaded.model.requires_grad_(False)
    adaptation = ADAPTATIONS[find_algorithm(asked.algorithm).adaptation](asked)
    if is_adapted:
        loaded = attach(loaded, adaptation, layout.device, layout.group, console)
    loaded, layout = divide(layout, loaded, adaptation, asked, layout.device, dtype, lengths, console)
    for note in loaded.notes:
        console.say(f"model: {note}")
    return loaded.model.eval(), layout

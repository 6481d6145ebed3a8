"""A saved model, ready to be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training_hub.algorithms import find_algorithm
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.model import choose_device, choose_dtype, load_model
from training_hub.backends.torch_engine.processor import prepare_processor
from training_hub.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

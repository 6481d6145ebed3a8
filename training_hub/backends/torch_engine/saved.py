"""A saved model, ready to be asked: the one place that tells apart what a folder may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training_hub.backends.torch_engine.model import choose_device, choose_dtype, load_model
from training_hub.backends.torch_engine.processor import prepare_processor
from training_hub.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_saved(recipe: Recipe) -> PreTrainedModel:
    """The model of model.path in evaluation mode, on the device and in the format that a run of it would choose.

    Raises RecipeError naming what is wrong with the folder.
    """
    device = choose_device()
    prepare_processor(device)
    return load_model(recipe, device, choose_dtype(recipe.model.dtype, device)).model

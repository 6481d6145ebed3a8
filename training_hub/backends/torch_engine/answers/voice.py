"""A saved model that one can talk to."""

from __future__ import annotations

from functools import partial

from training_hub.backends.shared import voice
from training_hub.backends.shared.materials import Limits, limits_of
from training_hub.backends.shared.voice import Stream, Voice
from training_hub.backends.torch_engine.answers.generate import stream
from training_hub.backends.torch_engine.loading.saved import load_saved
from training_hub.recipe import Recipe


def open_voice(recipe: Recipe) -> Voice:
    """The model of model.path with its tokenizer and the template of data.chat_template, or its own.

    Raises RecipeError or DataError naming what is wrong with it.
    """

    def load() -> tuple[Stream, Limits]:
        model = load_saved(recipe)
        return partial(stream, model), limits_of(model.config)

    return voice.open_voice(recipe, load)

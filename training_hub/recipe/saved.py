"""The recipe that loads a saved model, whatever its folder holds: a whole model, or an adapter beside its base."""

from __future__ import annotations

from pathlib import Path

from training_hub.errors import RecipeError
from training_hub.recipe.adapter_folder import CONFIG_FILE as ADAPTER
from training_hub.recipe.adapter_folder import origin_of
from training_hub.recipe.qat import Qat
from training_hub.recipe.recipe import Recipe

WHOLE = "config.json"


def with_saved(recipe: Recipe, path: str) -> Recipe:
    """The recipe with the model of `path`: a folder, a name on the hub, or the folder of an adapter.

    An adapter is loaded on the base that its configuration names, in as many bits as it was trained beside and rounding
    as it did then, with its own tokenizer where there is one beside it.
    Raises RecipeError where the configuration names no base.
    """
    folder = Path(path).expanduser()
    if not (folder / ADAPTER).is_file() or (folder / WHOLE).is_file():
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})
    try:
        origin = origin_of(folder)
        rounding = Qat.model_validate(origin["qat"]) if origin["qat"] else recipe.qat
    except (ValueError, AttributeError) as error:
        raise RecipeError(
            f"model.path: {folder / ADAPTER}, or what lies beside it, cannot be read: {error}. Fetch the file again."
        ) from error
    base = origin["path"]
    if not base:
        raise RecipeError(
            f"model.path: {folder / ADAPTER} names no base_model_name_or_path. Write the base's path there."
        )
    own = str(folder) if (folder / "tokenizer.json").is_file() else None
    model = {
        "path": str(base),
        "revision": origin["revision"],
        "quantization": origin["quantization"],
        "tokenizer": recipe.model.tokenizer or own,
    }
    return recipe.model_copy(
        update={
            "algorithm": "lora_sft",
            "model": recipe.model.model_copy(update=model),
            "qat": rounding,
            "lora": recipe.lora.model_copy(update={"adapter": str(folder)}),
        }
    )

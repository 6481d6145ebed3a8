"""What a model's config alone says of it: its limits, its shapes, the format that its weights come in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training_hub.backends.shared.materials import Limits, limits_of
from training_hub.backends.shared.model_folder import fetched, folder_problems, is_folder, stored_dtype, weight_files
from training_hub.backends.torch_engine.loading.quantization import straighten
from training_hub.backends.torch_engine.loading.quiet import library_bars
from training_hub.backends.torch_engine.loading.rounding import round_in_forward
from training_hub.errors import BackendError, RecipeError
from training_hub.recipe.qat import Qat
from training_hub.recipe.sections import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_limits(chosen: Model) -> Limits:
    """The limits of the recipe's model, from its config alone."""
    return limits_of(from_library(chosen, "AutoConfig", source_options(chosen)))


def read_blank_model(chosen: Model, rounding: Qat = Qat()) -> tuple[PreTrainedModel, torch.dtype]:
    """The recipe's model without contents, on torch's meta device, and the format it comes in: from its config alone.

    rounding: how its layers round in forward. Raises RecipeError where there is no config that can be read.
    """
    import transformers

    config, original = read_config(chosen, with_weights=False)
    with torch.device("meta"):
        blank = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=chosen.trust_remote_code)
    straighten(blank, chosen.quantization)
    round_in_forward(blank, rounding)
    return blank, original


def read_config(chosen: Model, *, with_weights: bool = True) -> tuple[Any, torch.dtype]:
    """The config of the model, and the format its weights come in. Raises RecipeError naming every problem of its
    folder; with_weights: also where that has no weights."""
    problems = folder_problems(chosen.path, trust_remote_code=chosen.trust_remote_code, with_weights=with_weights)
    if problems:
        raise RecipeError(problems)
    config = from_library(chosen, "AutoConfig", source_options(chosen))
    original = _original_dtype(chosen.path, config)
    # An implementation named in a config may be a kernel on the hub, that is: code. We choose, not the config.
    config._attn_implementation = None
    config._experts_implementation = None
    return config, original


def local_copy(chosen: Model) -> Model:
    """`chosen` as a folder here; of a name on the hub what it takes is fetched, unless it is in the hub's cache. Raises
    RecipeError where it cannot be."""
    if is_folder(chosen.path):
        return chosen
    code = ("*.py",) if chosen.trust_remote_code else ()
    try:
        folder = fetched(chosen.path, chosen.revision, ("*.json", *code))
        names = [file.relative_to(folder).as_posix() for file in weight_files(folder)]
        fetched(chosen.path, chosen.revision, names)
    except OSError as error:
        raise RecipeError(
            f"model.path: {chosen.path} is not a folder here and cannot be had from the hub: {error}"
        ) from error
    return chosen.model_copy(update={"path": str(folder), "revision": None})


def take_generation_config(model: PreTrainedModel, chosen: Model) -> None:
    """Let a model that was made from the config of `chosen` alone generate as that does; in place."""
    path = Path(chosen.path).expanduser() / "generation_config.json"
    if model.can_generate() and path.is_file():
        model.generation_config = from_library(chosen, "GenerationConfig", {"local_files_only": True})


def source_options(chosen: Model) -> dict[str, Any]:
    """Which code and files the library may take, for any of its `from_pretrained`."""
    options: dict[str, Any] = {"trust_remote_code": chosen.trust_remote_code}
    if is_folder(chosen.path):
        return {**options, "local_files_only": True}
    return {**options, "revision": chosen.revision} if chosen.revision else options


def from_library(chosen: Model, loader: str, options: Mapping[str, Any]) -> Any:
    """What `from_pretrained` of the library's class called `loader` gives for the recipe's model. Raises RecipeError
    where its files cannot be read, BackendError where they do not fit into memory."""
    import transformers

    path = str(Path(chosen.path).expanduser()) if is_folder(chosen.path) else chosen.path
    try:
        with library_bars():
            return getattr(transformers, loader).from_pretrained(path, **options)
    except OSError as error:
        where = "cannot be read" if is_folder(chosen.path) else "is not a folder here and cannot be had from the hub"
        raise RecipeError(f"model.path: {chosen.path} {where}: {error}") from error
    except Exception as error:
        # A damaged file, or one made to do harm, can make these libraries raise anything.
        first_line = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise BackendError(
                f"model.path: {chosen.path} does not fit into memory: {first_line} Use a smaller model or a larger "
                "machine; `training-hub plan` says what a run takes."
            ) from error
        raise RecipeError(
            f"model.path: {chosen.path} cannot be loaded: {type(error).__name__}: {first_line}. Fetch its files again."
        ) from error


def _original_dtype(path: str, config: Any) -> torch.dtype:
    """The weights' own format; for a name on the hub what its config says. transformers' default is float32."""
    name = stored_dtype(Path(path).expanduser()) if is_folder(path) else None
    said = getattr(torch, name) if name else getattr(config, "dtype", None)
    return getattr(torch, said) if isinstance(said, str) else said or torch.float32

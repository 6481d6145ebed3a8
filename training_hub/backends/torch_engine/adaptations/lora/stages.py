"""An adapter beside a model in stages: which parameter each tensor of its file is, whichever process has that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from training_hub.backends.torch_engine.adaptations.lora.files import tensors_in_file
from training_hub.backends.torch_engine.layouts.stages import DEGREE
from training_hub.errors import RecipeError

NONE = ""


def names_in_file(peft_model: Any, model: nn.Module) -> dict[str, str]:
    """By PEFT's names of the tensors in an adapter's file, the names of the parameters of `model` that they are; NONE
    for a tensor that is no trained parameter. The model must be whole."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: names.get(id(tensor), NONE) for name, tensor in tensors_in_file(peft_model).items()}


def refuse_shared(model: Any, names: Mapping[str, str], tuner: str) -> None:
    """Raise RecipeError for an adapter that has numbers in common for layers of several stages. names: as
    `names_in_file` gives them."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    table, head = (_trained(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    is_shared = any(counts[one] > 1 for one in _trained(model) - table)
    if is_shared or NONE in names.values():
        raise RecipeError(
            f"{DEGREE}: an adapter of {tuner} has numbers that all layers share, and a process has some of the layers. "
            "Write 1, or lora.tuner: lora."
        )
    if model.config.get_text_config().tie_word_embeddings and table and head - table:
        # PEFT makes two adapters, or copies, of the same numbers.
        raise RecipeError(
            "lora.target_modules, lora.modules_to_save: what is beside a table that is also the head, or its copy, "
            f"would lie in the first stage and in the last. Name other modules, or write {DEGREE}: 1."
        )


def _trained(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters() if parameter.requires_grad}

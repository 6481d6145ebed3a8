"""The section of quantization-aware training: how a quantised model will round, which the forward pass then does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from training_hub.recipe.sections import Count, Section


class Qat(Section):
    """Quantization-aware training: linear layers round in the forward pass as they will once the model is quantised,
    by torchao, and learn to say the right thing so. Head and embeddings stay as they are."""

    weight_dtype: Literal["int4", "int8"] | None = None
    """What weights are rounded to. Without it the model is trained as it is."""

    activation_dtype: Literal["int8"] | None = None
    """What the inputs of these layers are rounded to, token by token. Without it they are not."""

    group_size: Count = 32
    """Neighbouring weights of a row that share a scale; has to divide the width of every linear layer."""


def qat_problems(recipe: Any, names: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is at odds with quantization-aware training: paths, and a line for each.

    names: how the caller wrote each setting, as in `recipe.check`.
    """
    path, chosen = "qat.weight_dtype", recipe.qat.weight_dtype
    if chosen is None:
        return
    if recipe.model.quantization != "none":
        yield (
            (path, "model.quantization"),
            f"{names(path)}: {chosen} beside {names('model.quantization')}: {recipe.model.quantization}: the weights "
            "are in fewer bits already. Leave one out.",
        )
    if recipe.model.dtype == "float64":
        yield (
            (path, "model.dtype"),
            f"{names(path)}: torchao rounds float32 and bfloat16, and {names('model.dtype')} is float64. Write "
            f"{names.write('model.dtype', 'float32')}.",
        )
    if recipe.training.fp8:
        yield (
            (path, "training.fp8"),
            f"{names(path)}: {chosen} beside {names('training.fp8')}: true, which multiplies the same layers in other "
            "numbers. Leave one out.",
        )
    if recipe.qat.group_size < 2:
        yield (
            ("qat.group_size",),
            f"{names('qat.group_size')}: found 1; allowed: at least 2. Write {names.write('qat.group_size', 32)}.",
        )
    if recipe.algorithm == "lora_sft" and recipe.lora.merge:
        yield (
            (path, "lora.merge"),
            f"{names('lora.merge')}: true beside {names(path)}: the adapter is trained beside weights rounded to "
            f"{chosen}, and rounding its sum with them would be another model. Leave one out.",
        )

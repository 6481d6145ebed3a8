"""The section of adapters: what is added to a frozen model and trained in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training_hub.recipe.sections import Count, Decay, Positive, Section

OF_THE_ADAPTER = ("tuner", "r", "alpha", "target_modules", "modules_to_save", "trainable_tokens", "options")
"""What the folder of an adapter that a run goes on with says itself."""

STARTING_IN_WEIGHTS = ("pissa", "olora")
"""Tuners whose adapter starts as a part of the weights, which is taken out of them."""


class Lora(Section):
    """An adapter of PEFT beside the frozen weights: LoRA, and every other tuner that PEFT knows by name."""

    tuner: str = "lora"
    """lora, rslora, dora, pissa, olora, or another tuner by PEFT's name for it: oft, boft, ia3, vera, loha, lokr and
    more."""

    r: Count | None = None
    """Rank of what is added to each weight. Default: 16 for the kinds of LoRA, PEFT's own for other tuners."""

    alpha: Positive | None = None
    """What is added is multiplied by alpha / r (rslora: alpha / sqrt(r)). Default: 32 for the kinds of LoRA."""

    dropout: Decay | None = None
    """Dropout of what goes into the adapter. Default: 0. Only without it the fused kernels run."""

    target_modules: str | list[str] | None = None
    """Modules that get an adapter. all-linear: every linear layer but the head, and experts and routers of mixtures
    that PEFT knows to have been linear layers. A list: ends of module names, [q_proj, v_proj]. Another text: a regular
    expression for the whole name. One that matches nothing is an error. Default: all-linear; for ia3 and ln_tuning
    what PEFT knows for the model's architecture."""

    modules_to_save: list[str] | None = None
    """Ends of the names of modules that are trained in full and saved with the adapter, such as lm_head."""

    trainable_tokens: list[int | str] | None = None
    """Tokens, as text or id, whose rows in the table of embeddings (and in a head tied to it) are trained."""

    options: dict[str, Any] = {}
    """Further fields of the tuner's configuration in PEFT, by their names there: {layers_to_transform: [0, 1]}."""

    adapter: str | None = None
    """Folder of an adapter to go on with, in PEFT's format. Its own configuration holds."""

    merge: bool = False
    """Also write the model with the adapter merged into its weights, into `merged` beside the final model."""


def adapter_problems(recipe: Any, names: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is at odds in the settings of adapters and of the frozen weights beside them: paths, and a line for each.

    names: how the caller wrote each setting, as in `recipe.check`.
    """
    chosen = recipe.lora
    for name in OF_THE_ADAPTER if chosen.adapter is not None else ():
        if getattr(chosen, name) != Lora.model_fields[name].get_default(call_default_factory=True):
            path = f"lora.{name}"
            yield (
                (path, "lora.adapter"),
                f"{names(path)}: {getattr(chosen, name)} beside {names('lora.adapter')}, whose adapter_config.json "
                f"says it for the adapter that the run goes on with. Leave {path} out.",
            )
    if recipe.algorithm == "lora_sft" and chosen.merge and not recipe.checkpoint.final:
        yield (
            ("lora.merge", "checkpoint.final"),
            f"{names('lora.merge')}: true merges the final adapter, and {names('checkpoint.final')}: false writes "
            f"none. Write {names.write('checkpoint.final', True)}.",
        )
    yield from _quantization_problems(recipe, names)


def _quantization_problems(recipe: Any, names: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    path, chosen = "model.quantization", recipe.model.quantization
    if chosen == "none":
        return
    if recipe.algorithm != "lora_sft":
        yield (
            (path, "algorithm"),
            f"{names(path)}: {chosen} numbers cannot move by a gradient, and {recipe.algorithm} moves the weights "
            f"themselves. Train an adapter beside them, algorithm: lora_sft (training-hub lora-sft); or write "
            f"{names.write(path, 'none')}.",
        )
    if recipe.model.dtype == "float64":
        yield (
            (path, "model.dtype"),
            f"{names(path)}: {chosen} is multiplied in float32 or bfloat16, and {names('model.dtype')} is float64. "
            f"Write {names.write('model.dtype', 'float32')}.",
        )
    if recipe.lora.tuner in STARTING_IN_WEIGHTS:
        yield (
            (path, "lora.tuner"),
            f"{names('lora.tuner')}: {recipe.lora.tuner} takes its start out of the weights, which {chosen} numbers do "
            f"not allow. Write {names.write('lora.tuner', 'lora')}, or {names.write(path, 'none')}.",
        )

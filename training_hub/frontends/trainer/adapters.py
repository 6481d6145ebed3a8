"""A configuration of PEFT as settings of the section `lora`."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from training_hub.errors import RecipeError

OWN = ("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
       "inference_mode", "runtime_config")  # fmt: skip
"""Fields that PEFT keeps for itself."""

NAMED = {
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.target_modules",
    "modules_to_save": "lora.modules_to_save",
    "trainable_token_indices": "lora.trainable_tokens",
}
"""Fields that are settings of ours."""

STARTS = ("pissa", "olora")


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that a configuration of PEFT stands for, as far as it differs from PEFT's defaults, and the tuner.

    Raises RecipeError for what is none, or is for another task.
    """
    if not dataclasses.is_dataclass(type(config)) or not hasattr(config, "peft_type"):
        raise RecipeError(
            f"peft_config: found a {type(config).__name__}; allowed: a configuration of PEFT, such as LoraConfig(r=16)."
        )
    task = _plain(getattr(config, "task_type", None))
    if task not in (None, "CAUSAL_LM"):
        raise RecipeError(f"peft_config: task_type is {task!r}; allowed: CAUSAL_LM. Leave it out.")
    tuner = str(_plain(config.peft_type)).lower()
    changed = {one.name: getattr(config, one.name) for one in dataclasses.fields(config) if _is_changed(config, one)}
    found: dict[str, Any] = {"algorithm": "lora_sft"}
    if tuner == "lora":
        tuner, spent = _kind_of_lora(changed)
        changed = {name: value for name, value in changed.items() if name not in spent}
        found["lora.r"], found["lora.alpha"] = config.r, config.lora_alpha
    found["lora.tuner"] = tuner
    options = {}
    for name, value in changed.items():
        path = NAMED.get(name)
        if path is not None:
            found[path] = _plain(value)
        else:
            options[name] = _plain(value)
    return {**found, **({"lora.options": options} if options else {})}


def _kind_of_lora(changed: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The tuner of ours that fields of LoraConfig ask for, and the fields that say so."""
    start = changed.get("init_lora_weights")
    if start in STARTS:
        return str(start), ("init_lora_weights",)
    if changed.get("use_dora"):
        return "dora", ("use_dora",)
    if changed.get("use_rslora"):
        return "rslora", ("use_rslora",)
    return "lora", ()


def _is_changed(config: Any, field: dataclasses.Field[Any]) -> bool:
    if field.name in OWN or not field.init:
        return False
    if field.default_factory is not dataclasses.MISSING:
        default: Any = field.default_factory()
    else:
        default = field.default
    value = getattr(config, field.name)
    return value is not None and bool(value != default)


def _plain(value: Any) -> Any:
    """A value as a recipe file holds it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value

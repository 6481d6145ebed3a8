"""Which modules get an adapter: every pattern must match something, else the error says what there is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from training_hub.backends.torch_engine.loading.quantization import linear_layers
from training_hub.errors import RecipeError
from training_hub.recipe.names import nearest

ALL_LINEAR = "all-linear"


def refuse_idle(model: nn.Module, targets: Any, kept: Iterable[str] | None) -> None:
    """Raise RecipeError for each target and each module to save that no module of the model answers to."""
    found = [*_idle_targets(model, targets), *_idle_modules(model, kept or ())]
    if found:
        raise RecipeError(found)


def refuse_low(model: nn.Module, kept: Iterable[str] | None, quantization: str) -> None:
    """Raise RecipeError for each module to save with layers whose weights are kept in fewer bits, which cannot move."""
    low = set(map(id, linear_layers(model)))
    for one in kept or ():
        for name, module in model.named_modules():
            if name.endswith(one) and any(id(part) in low for part in module.modules()):
                raise RecipeError(
                    f"lora.modules_to_save: {one!r} is {name}, whose weights {quantization} keeps in bytes, which no "
                    "gradient moves. Leave it out, or write model.quantization: none."
                )


def _idle_targets(model: nn.Module, targets: Any) -> Iterator[str]:
    names = [name for name, _ in model.named_modules() if name]
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))]
    where = "lora.target_modules"
    if targets == ALL_LINEAR or targets is None:
        return
    if isinstance(targets, str):
        try:
            is_idle = not any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            yield f"{where}: {targets!r} is not a regular expression: {error}."
            return
        if is_idle:
            hint = f" For modules whose names end in it write [{targets}]." if targets in _ends(names) else ""
            yield f"{where}: {targets!r}, as a pattern for whole names, matches none.{hint} {_existing(linear)}"
        return
    if not targets:
        yield f"{where}: an empty list adapts nothing. {_existing(linear)}"
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = nearest(target, _ends(linear))
            hint = f" Did you mean {near}?" if near else ""
            yield f"{where}: {target!r} is the end of no module's name.{hint} {_existing(linear)}"


def _idle_modules(model: nn.Module, kept: Iterable[str]) -> Iterator[str]:
    names = [name for name, _ in model.named_modules() if name]
    for one in kept:
        if not any(name.endswith(one) for name in names):
            ends = _ends(names)
            near = nearest(one, ends)
            hint = f" Did you mean {near}?" if near else ""
            yield f"lora.modules_to_save: {one!r} is the end of no module's name.{hint} Ends: {', '.join(ends)}."


def _existing(names: list[str]) -> str:
    return f"Ends of names of linear layers and tables: {', '.join(_ends(names))}."


def _ends(names: Iterable[str]) -> list[str]:
    """The last parts of the names, each once, in order; without the numbers of layers."""
    return list(dict.fromkeys(end for name in names if not (end := name.rpartition(".")[2]).isdigit()))

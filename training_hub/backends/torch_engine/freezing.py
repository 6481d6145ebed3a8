"""Weights that stay as they are, and those that begin to train later: a pure function of recipe, model and step."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from training_hub.backends.torch_engine.checkpointing import layers_of
from training_hub.errors import RecipeError
from training_hub.recipe.freezing import Freezing
from training_hub.types import Console

Parameters = list[nn.Parameter]


def freeze(model: nn.Module, settings: Freezing) -> None:
    """Take the gradient from what stays frozen for the whole run; the model may lie on the meta device.

    Raises RecipeError where a setting matches nothing, or leaves nothing that trains.
    """
    problems = [*_block_problems(model, settings), *_name_problems(model, settings)]
    if problems:
        raise RecipeError(problems)
    for block in layers_of(model)[: settings.blocks]:
        block.requires_grad_(False)
    if settings.embeddings:
        for parameter in _tables(model):
            parameter.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(is_part(pattern, name) for pattern in settings.weights or ()):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("freezing: nothing is left that trains. Write a smaller freezing.blocks, or less to freeze.")


def is_part(pattern: str, name: str) -> bool:
    """Whether the dotted parts of `pattern` stand side by side among those of `name`; layers.1 is not in layers.10."""
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[start : start + len(wanted)], wanted)) for start in starts)


class Thaw:
    """What trains in which step where weights are unfrozen gradually; without that, nothing ever changes."""

    def __init__(self, model: nn.Module, settings: Freezing):
        self._interval = settings.unfreeze_interval
        self._turns = list(_turns(model, settings.unfrozen_blocks)) if self._interval else []
        self._open = len(self._turns)

    def begin(self, step: int, console: Console | None = None) -> None:
        """Step `step` (from 1) is about to make gradients: freeze what is not to train in it yet."""
        if self._interval is None:
            return
        is_open = min(len(self._turns), (step - 1) // self._interval)
        for number, (_, parameters) in enumerate(self._turns):
            for parameter in parameters:
                parameter.requires_grad_(number < is_open)
        if console is not None and is_open != self._open:
            begun = ", ".join(name for name, _ in self._turns[:is_open]) or "none yet"
            left = len(self._turns) - is_open
            console.say(f"freezing: from step {step} on these train that were frozen: {begun} ({left} to come)")
        self._open = is_open

    def frozen_at_first(self) -> int:
        """Numbers that train only later."""
        return sum(parameter.numel() for _, parameters in self._turns for parameter in parameters)


def _turns(model: nn.Module, unfrozen: int) -> Iterator[tuple[str, Parameters]]:
    """What is unfrozen in turn, by name: blocks from the top down, then the embeddings."""
    blocks = layers_of(model)
    if not blocks:
        raise RecipeError(_NO_BLOCKS.format(setting="freezing.unfreeze_interval", model=type(model).__name__))
    for number in reversed(range(max(0, len(blocks) - unfrozen))):
        parameters = [parameter for parameter in blocks[number].parameters() if parameter.requires_grad]
        if parameters:
            yield f"block {number}", parameters
    tables = [parameter for parameter in _tables(model) if parameter.requires_grad]
    if tables:
        yield "embeddings", tables


def _tables(model: nn.Module) -> Parameters:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [parameter for table in tables for parameter in table.parameters()]


_NO_BLOCKS = (
    "{setting}: the blocks of {model} are not known to transformers as such. Name weights instead: freezing.weights."
)


def _block_problems(model: nn.Module, settings: Freezing) -> Iterator[str]:
    there = len(layers_of(model))
    if settings.blocks and not there:
        yield _NO_BLOCKS.format(setting="freezing.blocks", model=type(model).__name__)
    elif settings.blocks > there:
        yield f"freezing.blocks: found {settings.blocks}; the model has {there}. Write freezing.blocks: {there}."
    if settings.unfreeze_interval and settings.unfrozen_blocks >= there > 0:
        yield (
            f"freezing.unfrozen_blocks: found {settings.unfrozen_blocks}; the model has {there} blocks, so that none "
            f"would be unfrozen later. Write freezing.unfrozen_blocks: {there - 1}, or leave unfreeze_interval out."
        )


def _name_problems(model: nn.Module, settings: Freezing) -> Iterator[str]:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in settings.weights or ():
        if not any(is_part(pattern, name) for name in names):
            yield (
                f"freezing.weights: {pattern!r} is in none of the names of the model's {len(names)} weights, such as "
                f"{names[0]} and {names[-1]}."
            )

"""Weights of a torch model that take no gradient: for the whole run, or until their turn comes."""

from __future__ import annotations

from torch import nn

from training_hub.backends.shared.freezing import Parts, Turns, frozen_keys
from training_hub.backends.torch_engine.checkpointing import layers_of
from training_hub.recipe.freezing import Freezing
from training_hub.types import Console


def freeze(model: nn.Module, settings: Freezing) -> None:
    """Take the gradient from what stays frozen for the whole run; the model may lie on the meta device.

    Raises RecipeError where a setting matches nothing, or leaves nothing that trains.
    """
    frozen = frozen_keys(_parts(model), settings)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


class Thaw:
    """What trains in which step where weights are unfrozen gradually; without that, nothing ever changes."""

    def __init__(self, model: nn.Module, turns: Turns):
        """turns: of the whole model, of which this process may have some layers."""
        self._parameters, self._turns = dict(model.named_parameters()), turns
        self._open = len(self._turns.turns)

    def begin(self, step: int, console: Console | None = None) -> None:
        """Step `step` (from 1) is about to make gradients: freeze what is not to train in it yet."""
        if self._turns.interval is None:
            return
        waiting, count = self._turns.waiting(step), self._turns.count(step)
        for _, names in self._turns.turns:
            for name in self._parameters.keys() & names:
                self._parameters[name].requires_grad_(name not in waiting)
        if console is not None and count != self._open:
            console.say(self._turns.told(step))
        self._open = count

    def frozen_at_first(self) -> int:
        """Numbers that train only later."""
        return sum(self._parameters[name].numel() for _, names in self._turns.turns for name in names)


def turns_of(model: nn.Module, settings: Freezing) -> Turns:
    """What is unfrozen in turn of a whole model, with what stays frozen taken from it."""
    if settings.unfreeze_interval is None:
        return Turns()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return Turns.of(_parts(model), settings, frozen)


def _parts(model: nn.Module) -> Parts:
    keys = {id(parameter): name for name, parameter in model.named_parameters()}

    def of(*modules: nn.Module) -> tuple[str, ...]:
        return tuple(keys[id(parameter)] for module in modules for parameter in module.parameters())

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return Parts(
        names=[(name, keys[id(one)]) for name, one in model.named_parameters(remove_duplicate=False)],
        blocks=[of(block) for block in layers_of(model)],
        tables=of(*tables),
        model=type(model).__name__,
    )

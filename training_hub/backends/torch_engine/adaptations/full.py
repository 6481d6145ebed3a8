"""Full fine-tuning: every weight may move that is not frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from training_hub.backends.torch_engine.adaptations.holdings import Holdings
from training_hub.backends.torch_engine.adaptations.of_parameters import OfParameters
from training_hub.backends.torch_engine.freezing import freeze
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.base_weights import OpenBase, Written
from training_hub.backends.torch_engine.saving.model_files import ModelFiles
from training_hub.recipe.freezing import Freezing
from training_hub.types import Console, Proof


class Full(OfParameters):
    """The adaptation that adapts everything but what is frozen: nothing is replaced, nothing happens around a step."""

    def __init__(self, freezing: Freezing | None = None) -> None:
        self._freezing = freezing
        self._model: nn.Module = nn.Module()

    def attach(self, model: nn.Module, console: Console | None = None) -> nn.Module:
        """The same model, with a gradient for each of its floating-point parameters that is not frozen."""
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if self._freezing is not None:
            freeze(model, self._freezing)
        self._model = model
        return model

    def holdings(self) -> Holdings:
        """Nothing beside the model."""
        return Holdings()

    def begin(self, console: Console) -> None:
        """Nothing to prepare from the weights."""

    def further(self, final: Path, rows: Sequence[Sequence[int]], console: Console, group: Group) -> None:
        """Make something of the final model beside it: nothing."""

    def proofs(self) -> list[Proof]:
        """What an adaptation itself can prove before the first step: nothing."""
        return []

    files: ModelFiles | None = None
    """How the final model is written and read again: as a whole one."""

    def export(self, weights: dict[str, Tensor], written: Written, came: OpenBase | None = None) -> dict[str, Tensor]:
        """The state dict to write, on the CPU: `weights` (by parameter name, as the optimizer moves them) as `written`.

        Tied weights stand under each of their names and share one tensor, which is how transformers recognises them;
        what the optimizer does not move is as it is in the model. came: the weights as they came, which are what is
        written of all that nothing has moved.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        moved = {id(p): weights[name] for name, p in self._model.named_parameters() if name in weights}
        state = self._model.state_dict()
        names: dict[int, list[str]] = {}
        sources: dict[int, Tensor] = {}
        for name, tensor in state.items():
            key = id(parameters.get(name, tensor))
            names.setdefault(key, []).append(name)
            sources[key] = moved.get(key, tensor).detach()
        tensors: dict[str, Tensor] = {}
        for key, source in sources.items():
            same = came.unmoved(names[key], source, written) if came is not None else None
            cast = source.to(written.dtype if source.is_floating_point() else source.dtype).cpu()
            tensors |= dict.fromkeys(names[key], cast if same is None else same)
        return {name: tensors[name] for name in state}

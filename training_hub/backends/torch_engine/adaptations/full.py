"""Full fine-tuning: every weight may move."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Full:
    """The adaptation that adapts everything: nothing is replaced, nothing happens around a step."""

    def __init__(self) -> None:
        self._model: nn.Module = nn.Module()

    def attach(self, model: nn.Module) -> nn.Module:
        """The same model, with a gradient for each of its floating-point parameters."""
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._model = model
        return model

    def before_step(self) -> None:
        """Nothing to do before the optimizer moves the weights."""

    def after_step(self) -> None:
        """Nothing to do after it."""

    def export(self, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The state dict to write, on the CPU: `weights` (by parameter name, as the optimizer moves them) as `dtype`.

        Tied weights stand under each of their names and share one tensor, which is how transformers recognises them;
        what the optimizer does not move is as it is in the model.
        """
        names = dict(self._model.named_parameters(remove_duplicate=False))
        moved = {id(p): weights[name] for name, p in self._model.named_parameters() if name in weights}
        cast: dict[int, Tensor] = {}
        tensors = {}
        for name, tensor in self._model.state_dict().items():
            key = id(names.get(name, tensor))
            if key not in cast:
                source = moved.get(key, tensor)
                cast[key] = source.detach().to(dtype if source.is_floating_point() else source.dtype).cpu()
            tensors[name] = cast[key]
        return tensors

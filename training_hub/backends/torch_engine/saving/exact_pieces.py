"""The exact numbers of a divided model, as far as this process has them, under the names that files have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from training_hub.backends.torch_engine.layouts.pieces import local_of, whole_of
from training_hub.backends.torch_engine.saving.growing_file import About

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.run import Run


class Exact:
    """The tensors that this process has pieces of, by the name that files have for them: their exact numbers, each made
    when it is asked for. A copy of what an earlier stage has is left out.

    begun: names of those that are more than what processes have pieces of, which the writer completes.
    """

    def __init__(self, run: Run):
        self.model, self._adaptation, self._masters = run.model, run.adaptation, run.updater.masters
        names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        found = named_tensors(run.model)
        self._own_names = {name: names.get(id(tensor), name) for name, tensor in found.items()}
        self.tensors = {n: one for n, one in found.items() if not run.layout.is_second(self._own_names[n])}
        self.begun = frozenset(n for n in self.tensors if self._adaptation.begun(self._own_names[n]) is not None)

    def present(self, name: str) -> Tensor:
        """This process's piece of the tensor; of one that is begun, its rounding."""
        own = self._own_names[name]
        is_moved = own in self._masters.weights
        return local_of((self._masters.exact(own) if is_moved else self.tensors[name]).detach())

    def piece(self, name: str) -> Tensor:
        """This process's piece of the tensor, or of what its writer completes."""
        begun = self._adaptation.begun(self._own_names[name]) if name in self.begun else None
        return self.present(name) if begun is None else begun

    def whole(self, name: str) -> Tensor:
        """All of what `piece` gives a piece of; all processes that have one must ask."""
        return whole_of(self.piece(name), self.tensors[name])

    def completed(self, name: str, whole: Tensor) -> Tensor:
        """The tensor, from `whole`."""
        return self._adaptation.completed(self._own_names[name], whole) if name in self.begun else whole

    def about(self) -> dict[str, About]:
        """Shape and format of each."""
        return {name: (tuple(one.shape), self.piece(name).dtype) for name, one in self.tensors.items()}


def named_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones under the name that transformers saves, and the buffers that are saved."""
    saved = model.state_dict().keys() - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in saved - tied}

"""What every adaptation can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from training_hub.backends.torch_engine.adaptations.holdings import Holdings
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.base_weights import OpenBase, Written
from training_hub.backends.torch_engine.saving.model_files import ModelFiles
from training_hub.types import Console, Proof


class Adaptation(Protocol):
    """Chooses or replaces the weights that train.

    claimed: parameters that it moves itself, which the optimizer leaves alone. undivided: those that stay whole in each
    process where the model is divided. adds_gradients: whether `gather` adds to gradients of parameters, which
    processes can then not add up before.
    """

    claimed: frozenset[str]
    undivided: frozenset[str]
    adds_gradients: bool

    @property
    def files(self) -> ModelFiles | None:
        """How the final model is written and read again; None: as a whole one."""
        ...

    @property
    def dealt(self) -> frozenset[str]:
        """Parameters of which its `weights`, and what it keeps beside them, lie in one of the processes with pieces."""
        ...

    def begins_beside(self) -> str:
        """Why it must be attached to a model that has its weights; "" where they may be read later."""
        ...

    def attach(self, model: nn.Module) -> nn.Module:
        """Choose or replace what trains; the model may lie on the meta device."""
        ...

    def holdings(self) -> Holdings:
        """What it will hold beside the model that was attached, from shapes alone."""
        ...

    def expect_steps(self, total: int) -> None:
        """The run will have so many optimizer steps. Raises RecipeError where they are too few."""
        ...

    def begin(self, console: Console) -> None:
        """Prepare what depends on the weights."""
        ...

    def shared(self) -> None:
        """What was attached to a model without weights has its numbers, which processes that share work out made of
        single weights; all processes of the group must call it."""
        ...

    def filled(self) -> None:
        """The model is divided and its weights are there as they came; others are about to take the place of some."""
        ...

    def divided(self) -> None:
        """The model's parameters have been divided over processes: they are other objects from now on."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves beside the model's own parameters, by name."""
        ...

    def sources(self) -> dict[str, str]:
        """By the name of each of `weights`, the parameter whose gradient its own is made from."""
        ...

    def begun(self, name: str) -> Tensor | None:
        """This process's piece of what a parameter, before it was rounded to the format of the model, is made of by
        `completed`; None for those that the optimizer, or the model, has as they are."""
        ...

    def completed(self, name: str, whole: Tensor) -> Tensor:
        """The exact parameter, from `whole`, which is put together of what `begun` gives and may be changed."""
        ...

    def expect_last_backward(self) -> None:
        """The next backward completes the gradients of a step."""
        ...

    def collect(self) -> None:
        """Something else than backward may have made gradients."""
        ...

    def gather(self) -> None:
        """The gradients of a step are complete: make those of `weights` from them."""
        ...

    def drop_gradients(self) -> None: ...

    def before_step(self, rate: float) -> None:
        """The optimizer is about to move the weights at this learning rate."""
        ...

    def after_step(self) -> None: ...

    def metrics(self) -> dict[str, Tensor]:
        """Scalars to report after a step, by name."""
        ...

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the weights that the optimizer moves."""
        ...

    def is_here(self, key: str) -> bool:
        """Whether a tensor of a checkpoint that is no parameter, called so, belongs to a weight of this process."""
        ...

    def is_spoken_for(self, key: str) -> bool | None:
        """Whether this process writes a tensor of a checkpoint, called so, that belongs to a parameter of `dealt`; None
        for others."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved` gave; `weights` have been taken over before."""
        ...

    def export(self, weights: dict[str, Tensor], written: Written, came: OpenBase | None = None) -> dict[str, Tensor]:
        """The state dict to write. came: the weights as they came, for a whole model of which some have not moved."""
        ...

    def proofs(self) -> list[Proof]:
        """What it proves of itself before the first step."""
        ...

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """Further safetensors files of the final model's folder, by name; where stages have layers of their own, what
        they hold of those that are here."""
        ...

    def further(self, final: Path, rows: Sequence[Sequence[int]], console: Console, group: Group) -> None:
        """Make what is wanted of the final model beside it. rows: token ids of rows that were not trained. group: the
        processes over which the model is divided, all of which must call it."""
        ...

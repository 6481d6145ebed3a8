"""What adaptations share whose trained weights are parameters of the model: nothing happens around a step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class OfParameters:
    """The part of an adaptation that has nothing to do where the optimizer moves the model's own parameters."""

    claimed: frozenset[str] = frozenset()
    """Parameters that the adaptation moves itself; the optimizer leaves them alone."""

    undivided: frozenset[str] = frozenset()
    """Parameters that stay whole in each process where the model is divided."""

    dealt: frozenset[str] = frozenset()
    """Parameters of which `weights` lie in one process of those with pieces: there are none."""

    adds_gradients: bool = False
    """Whether `gather` adds to gradients of parameters, which processes can then not add up before."""

    def begins_beside(self) -> str:
        """What is attached asks for no weights."""
        return ""

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves beside the model's own parameters: nothing."""
        return {}

    def sources(self) -> dict[str, str]:
        """By such a weight, the parameter whose gradient its own is made from: there is none."""
        return {}

    def begun(self, name: str) -> Tensor | None:
        """The optimizer knows parameters before they were rounded."""
        return None

    def completed(self, name: str, whole: Tensor) -> Tensor:
        """The parameter as it is."""
        return whole

    def expect_steps(self, total: int) -> None:
        """Nothing depends on how many steps the run has."""

    def shared(self) -> None:
        """Nothing to do before the model is divided."""

    def filled(self) -> None:
        """Nothing to learn from weights that are about to change."""

    def divided(self) -> None:
        """Nothing to hold on to when the model's parameters are divided over processes."""

    def expect_last_backward(self) -> None:
        """Nothing to do with a gradient before all are there."""

    def collect(self) -> None:
        """The optimizer's masters take all gradients."""

    def gather(self) -> None:
        """Nothing to do once the gradients of a step are complete."""

    def drop_gradients(self) -> None:
        """No gradients but those of the parameters."""

    def before_step(self, rate: float) -> None:
        """Nothing to do before the optimizer moves the weights."""

    def after_step(self) -> None:
        """Nothing to do after it."""

    def metrics(self) -> dict[str, Tensor]:
        """Nothing to measure."""
        return {}

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the weights that the optimizer moves: nothing."""
        return {}

    def is_here(self, key: str) -> bool:
        """Nothing is kept of a weight but what the optimizer keeps."""
        return False

    def is_spoken_for(self, key: str) -> bool | None:
        """Nothing is dealt out."""
        return None

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """Further files of the final model's folder: none."""
        return {}

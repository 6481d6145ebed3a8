"""How much an adaptation holds beside the model, in numbers: for the plan of a run, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Holdings:
    """What there is because of an adaptation.

    claimed: parameters that it moves itself. trained: numbers that the optimizer moves for them. fixed: numbers that it
    keeps, in float32. copied: numbers that it keeps where the model computes in 16 bits, in the format that they came
    in; `copied_bytes` each. gradients: numbers of the gradients that wait for further packs of a step in place of those
    of the claimed parameters. complete: the same once those of a step are complete. saved: numbers in a checkpoint
    beside those that the optimizer moves. exported: numbers of the final model's files, where these are not the whole
    model. quantised: numbers of frozen weights that take so many `bits` each, scales included.
    """

    claimed: frozenset[str] = frozenset()
    trained: int = 0
    fixed: int = 0
    copied: int = 0
    copied_bytes: int = 2
    gradients: int = 0
    complete: int = 0
    saved: int = 0
    exported: int | None = None
    quantised: int = 0
    bits: float = 0.0

    def spared(self, itemsize: int) -> float:
        """Bytes by which frozen weights are smaller than in a format of `itemsize` bytes."""
        return self.quantised * (itemsize - self.bits / 8)

    def of_share(self, share: float) -> Holdings:
        """What a process has of it that has this share of the layers."""
        numbers = {name: round(share * getattr(self, name)) for name in OF_LAYERS}
        return replace(self, **numbers)


OF_LAYERS = ("trained", "fixed", "copied", "gradients", "complete", "saved", "quantised")
NOTHING = Holdings()

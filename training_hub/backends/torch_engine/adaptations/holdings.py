"""How much an adaptation holds beside the model, in numbers: for the plan of a run, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from training_hub.backends.torch_engine.parallel import shared_out


@dataclass(frozen=True)
class Part:
    """What belongs to one claimed parameter of `size` numbers; is_stack: of several matrices, as experts are."""

    name: str
    size: int
    trained: int
    fixed: int
    is_stack: bool = False

    def with_more(self, other: Part) -> Part:
        """With what belongs to another part of the same parameter."""
        return replace(
            self,
            size=self.size + other.size,
            trained=self.trained + other.trained,
            fixed=self.fixed + other.fixed,
        )


@dataclass(frozen=True)
class Beginning:
    """What there is only before the first step, where something is made of matrices by decomposing one after another.

    whole: numbers of the one that takes most; scratch: bytes that come and go while it is decomposed, beside it, in the
    precision of that. waiting: numbers of the weights that others take the place of, each kept whole by one process, on
    the CPU, until a model is divided that has not read its weights yet.
    """

    whole: int = 0
    scratch: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Holdings:
    """What there is because of an adaptation.

    claimed: parameters that it moves itself. trained: numbers that the optimizer moves for them. fixed: numbers that it
    keeps, in float32. copied: numbers that it keeps where the model computes in 16 bits, in the format that they came
    in; `copied_bytes` each. gradients: numbers of the gradients that wait for further packs of a step in place of those
    of the claimed parameters. complete: the same once those of a step are complete. saved: numbers in a checkpoint
    beside those that the optimizer moves. exported: numbers of the final model's files, where these are not the whole
    model. quantised: numbers of frozen weights that take so many `bits` each, scales included. parts: by parameter, of
    trained and fixed what one of the processes has alone that keep a slice of that parameter. beginning: what there is
    before the first step alone.
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
    parts: tuple[Part, ...] = ()
    beginning: Beginning = Beginning()

    @property
    def largest(self) -> int:
        """Numbers of the largest parameter that is one of `parts`."""
        return max((one.size for one in self.parts), default=0)

    def dealt_out(self, slices: int, among: int, stacks: int) -> Holdings:
        """What the process has of it that has most, where weights lie in `slices`: each of `parts` lies in one of so
        many (`among`, or `stacks` for stacks; in all of them for 1)."""
        if not self.parts:
            return self
        trained = fixed = 0
        for is_stack, count in ((False, among), (True, stacks)):
            own = {one.name: one for one in self.parts if one.is_stack == is_stack}
            shares = shared_out({name: float(own[name].size) for name in sorted(own)}, count)
            sums = [(sum(own[n].trained for n in some), sum(own[n].fixed for n in some)) for some in shares]
            most = max(sums, key=sum)
            trained, fixed = trained + most[0], fixed + most[1]
        dense = sum(one.size for one in self.parts)
        return replace(
            self, trained=trained, fixed=fixed, gradients=dense, complete=trained, saved=dense // slices + fixed
        )

    def spared(self, itemsize: int) -> float:
        """Bytes by which frozen weights are smaller than in a format of `itemsize` bytes."""
        return self.quantised * (itemsize - self.bits / 8)

    @property
    def scales(self) -> float:
        """Bytes of the scales of frozen weights in few bits, which no process has a slice of."""
        return self.quantised * (self.bits % 1) / 8

    def of_share(self, share: float) -> Holdings:
        """What a process has of it that has this share of the layers."""
        numbers = {name: round(share * getattr(self, name)) for name in OF_LAYERS}
        kept = tuple(sorted(self.parts, key=lambda one: one.name))[: round(share * len(self.parts))]
        return replace(self, parts=kept, **numbers)


OF_LAYERS = ("trained", "fixed", "copied", "gradients", "complete", "saved", "quantised")
NOTHING = Holdings()

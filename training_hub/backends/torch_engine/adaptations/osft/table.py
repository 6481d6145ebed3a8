"""What OSFT does with each weight of a model, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

KINDS_SHOWN = 12


@dataclass(frozen=True)
class Row:
    """What is known of a target once it is cut. kept: of its singular directions, `side` in all, those that are
    protected. trained: numbers that train in the others."""

    parameter_name: str
    kept: int
    side: int
    trained: int


@dataclass(frozen=True)
class Weights:
    """The parameters of a whole model: how many `numbers` each has, by name, and which are `moving`."""

    numbers: Mapping[str, int]
    moving: frozenset[str]

    @staticmethod
    def of(model: nn.Module) -> Weights:
        """As they are now."""
        named = dict(model.named_parameters())
        moving = frozenset(name for name, parameter in named.items() if parameter.requires_grad)
        return Weights({name: parameter.numel() for name, parameter in named.items()}, moving)


def told(weights: Weights, rows: Sequence[Row]) -> Iterator[str]:
    """One line each for what is protected, trained in full, and frozen, with numbers and shares."""
    held = {row.parameter_name for row in rows}
    numbers, moving = weights.numbers, weights.moving
    total = sum(numbers.values())

    def line(what: str, names: Iterable[str]) -> str:
        chosen = list(names)
        size = sum(numbers[name] for name in chosen)
        return f"{what:<16} {size:>15,} numbers {size / total:>6.1%}  {kinds(chosen) or 'none'}"

    yield line("protected", held)
    yield line("trained in full", moving - held)
    yield line("frozen", numbers.keys() - moving - held)
    if rows:
        share = sum(row.kept for row in rows) / sum(row.side for row in rows)
        yield (
            f"of the protected weights' singular directions {share:.1%} are kept ({min(row.kept for row in rows)} to "
            f"{max(row.kept for row in rows)} of a weight); {sum(row.trained for row in rows):,} numbers train in the "
            "others"
        )
    if moving - held:
        yield "what is trained in full has no protection; osft.others: freeze leaves it as it is"


def kinds(names: Iterable[str]) -> str:
    """The names of weights without the number of their layer, each with how often it occurs."""
    counts = Counter(
        ".".join(part for part in name.removesuffix(".weight").split(".")[-2:] if not part.isdigit())
        for name in sorted(names)
    )
    shown = [f"{count} {kind}" if count > 1 else kind for kind, count in counts.items()]
    more = f" and {len(shown) - KINDS_SHOWN} more kinds" if len(shown) > KINDS_SHOWN else ""
    return ", ".join(shown[:KINDS_SHOWN]) + more

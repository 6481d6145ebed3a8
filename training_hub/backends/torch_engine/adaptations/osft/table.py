"""What OSFT does with each weight of a model, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.backends.torch_engine.adaptations.osft.targets import Target

KINDS_SHOWN = 12


def told(model: nn.Module, pairs: Sequence[tuple[Target, Split]], trained: int) -> Iterator[str]:
    """One line each for what is protected, trained in full, and frozen, with numbers and shares.

    trained: how many numbers train in the low parts.
    """
    held = {target.parameter_name for target, _ in pairs}
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = sum(numbers.values())

    def line(what: str, names: Iterable[str]) -> str:
        chosen = list(names)
        size = sum(numbers[name] for name in chosen)
        return f"{what:<16} {size:>15,} numbers {size / total:>6.1%}  {kinds(chosen) or 'none'}"

    yield line("protected", held)
    yield line("trained in full", moving - held)
    yield line("frozen", numbers.keys() - moving - held)
    kept = [(target.short_side - split.left.shape[-1], target.short_side) for target, split in pairs]
    if kept:
        share = sum(k for k, _ in kept) / sum(side for _, side in kept)
        yield (
            f"of the protected weights' singular directions {share:.1%} are kept ({min(k for k, _ in kept)} to "
            f"{max(k for k, _ in kept)} of a weight); {trained:,} numbers train in the others"
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

"""The section of freezing: which weights stay as they are, for the whole run or until their turn comes."""

from __future__ import annotations

from training_hub.recipe.sections import Count, Index, Section


class Freezing(Section):
    """Weights that stay as they are: they take no gradient, no optimizer state and, below the lowest weight that
    trains, no backward pass."""

    blocks: Index = 0
    """The first so many blocks (decoder layers) stay as they are."""

    embeddings: bool = False
    """The tables of tokens and positions stay as they are, and with them a head that shares the table."""

    weights: list[str] | None = None
    """Parts of the names of further weights that stay as they are: lm_head, layers.0, self_attn.*.bias. Parts are
    compared whole, between dots; `*` stands for anything in one."""

    unfreeze_interval: Count | None = None
    """Unfreeze gradually: after every so many steps the next block from the top down begins to train, after the last
    of them the embeddings. What the settings above freeze stays frozen."""

    unfrozen_blocks: Index = 1
    """With unfreeze_interval, blocks at the top that train from the first step on."""

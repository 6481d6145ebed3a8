"""The section of OSFT: which directions of which weights are protected, and what trains in the others."""

from __future__ import annotations

from typing import Literal

from training_hub.recipe.sections import Section, Share


class Osft(Section):
    """Orthogonal subspace fine-tuning: the largest singular directions of each weight are protected, the others
    train."""

    unfreeze_rank_ratio: Share | None = None
    """Share of each matrix's singular directions that may move, the smallest ones; floor(rank x (1 - ratio)) are
    protected. 0 freezes the matrices, 1 trains them in full. More than 0.5 is seldom needed."""

    energy: Share | None = None
    """Protect in each matrix the fewest directions that hold this share of the sum of its squared singular values,
    instead of unfreeze_rank_ratio."""

    importance: bool = False
    """Share unfreeze_rank_ratio out over the model's blocks by the paper's rule: a block is protected more, the less it
    changes the hidden states of the rows of evaluation.watch (mean cosine of what it is given and what it gives)."""

    least_kept: Share = 0.1
    """With importance, the share of directions that a block without any would keep (the paper's minimum)."""

    targets: list[str] | None = None
    """Parts of the names of weights to protect. Default: the weights of all linear layers inside the model's blocks,
    and of experts."""

    others: Literal["train", "freeze"] = "train"
    """What all other weights do (embeddings, head, norms, biases, routers): train in full and unprotected, or stay."""

    form: Literal["factors", "core"] = "factors"
    """What trains. factors: U, S and V of the low part, as the reference does. core: one matrix between fixed bases,
    which reaches the same weights with fewer numbers."""

    split_fused: bool = False
    """Cut each projection of a fused weight (query, key and value; gate and up) by itself."""

    gradients: Literal["step", "layer"] = "step"
    """When dense gradients become those of what trains, each as soon as it is there: in the last backward of a step, or
    in the backward of each of its packs, which needs less memory and more time where a step has several."""

    carry: bool = False
    """Protect over a sequence of tasks: go on from the osft_state.safetensors beside the model, where there is one,
    and write one beside the final model."""

    cache: bool = True
    """Keep decompositions on disk beside tokenised data, found again by the hash of the weight."""

"""Ranks by the paper's rule: what a layer changes least is protected most.

Source: Nayak et al. 2025, arXiv:2504.07097. A layer's importance is the cosine between
what it is given and what it gives, on rows of what must not be forgotten. The paper writes it of a linear layer, whose
two sides are seldom as wide as one another; here it is of a block, which adds to a hidden state of one width, and all
weights of a block share its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from training_hub.backends.torch_engine.objectives.cross_entropy import model_logits
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.data.packing import pack
from training_hub.data.store import TokenStore
from training_hub.errors import RecipeError
from training_hub.types import Console

MOST_TOKENS = 65_536  # a mean over more of them would not move


@torch.no_grad()
def layer_importance(
    model: PreTrainedModel, store: TokenStore, device: torch.device, console: Console
) -> dict[str, float]:
    """By the name of each block, the mean cosine between the hidden states before and after it, over the tokens of
    `store`, the first 65,536 of them at most. Raises RecipeError for a model without blocks."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    if not blocks:
        raise RecipeError(
            f"osft.importance: {type(model).__name__} has no blocks to measure. Write osft.importance: false."
        )
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in blocks}
    was_training, seen, total = model.training, 0, min(int(store.lengths.sum()), MOST_TOKENS)
    model.eval()
    with ExitStack() as hooks, console.progress("measuring importance", total=total, unit="tokens") as advance:
        for name, block in blocks.items():
            handle = block.register_forward_hook(_added_to(sums[name]), with_kwargs=True)
            hooks.callback(handle.remove)
        for index in range(len(store)):
            if seen >= MOST_TOKENS:
                break
            one = pack([store[index]], [index])
            model_logits(model, to_device(one, device))
            seen += len(one)
            advance(len(one))
    model.train(was_training)
    return {name: float(value) / seen for name, value in sums.items()}


def shares_kept(importance: Mapping[str, float], least: float, target: float) -> dict[str, float]:
    """By block, the share of singular directions to protect: least + I (target - least), I being the block's importance
    over the mean of all; so that the mean is `target` where none had to be held between `least` and 1.

    Raises RecipeError where the mean is not positive.
    """
    mean = sum(importance.values()) / len(importance)
    if not mean > 0:
        raise RecipeError(
            f"osft.importance: the mean cosine of the blocks is {mean:.3f}; ranks can be shared out by it above 0. "
            "Write osft.importance: false."
        )
    shares = {name: least + value / mean * (target - least) for name, value in importance.items()}
    return {name: min(max(share, least), 1.0) for name, share in shares.items()}


def _added_to(total: Tensor) -> Callable[..., None]:
    def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        before = arguments[0] if arguments else keywords["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        total.add_(torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).sum().double())

    return add

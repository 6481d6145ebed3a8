"""Ranks by the paper's rule: what a layer changes least is protected most.

Source: Nayak et al. 2025, arXiv:2504.07097. A layer's importance is the cosine between
what it is given and what it gives, on rows of what must not be forgotten. The paper writes it of a linear layer, whose
two sides are seldom as wide as one another; here it is of a block, which adds to a hidden state of one width, and all
weights of a block share its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.layouts.context import PartTensors
from training_hub.backends.torch_engine.layouts.mesh import groups_along
from training_hub.backends.torch_engine.objectives.cross_entropy import model_logits
from training_hub.backends.torch_engine.tensors import PackTensors
from training_hub.data.packing import pack
from training_hub.data.store import TokenStore
from training_hub.errors import RecipeError
from training_hub.types import Console

MOST_TOKENS = 65_536  # a mean over more of them would not move


@torch.no_grad()
def layer_importance(
    model: PreTrainedModel, store: TokenStore, device: torch.device, console: Console, layout: Layout = WHOLE
) -> dict[str, float]:
    """By the name of each block, the mean cosine between the hidden states before and after it, over the tokens of
    `store`, the first 65,536 of them at most. layout: how the model is divided, whose processes must then all call it.
    Raises RecipeError for a model without blocks."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    if not blocks:
        raise RecipeError(
            f"osft.importance: {type(model).__name__} has no blocks to measure. Write osft.importance: false."
        )
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in blocks}
    was_training, seen, total = model.training, 0, min(int(store.lengths.sum()), MOST_TOKENS)
    model.eval()
    counted: list[Tensor | slice] = []
    with ExitStack() as hooks, console.progress("measuring importance", total=total, unit="tokens") as advance:
        if layout.tokens is not None:
            hooks.enter_context(layout.tokens.whole())
        for name, block in blocks.items():
            handle = block.register_forward_hook(_added_to(sums[name], counted), with_kwargs=True)
            hooks.callback(handle.remove)
        for index in range(len(store)):
            if seen >= MOST_TOKENS:
                break
            one = pack([store[index]], [index])
            tensors = layout.tensors(model, one)
            counted[:] = [_own_tokens(tensors)]
            model_logits(model, tensors)
            seen += len(one)
            advance(len(one))
    model.train(was_training)
    for group in groups_along(layout.mesh, ("cp",)):
        for value in sums.values():
            dist.all_reduce(value, group=group)
    return layout.told_by_stages({name: float(value) / seen for name, value in sums.items()})


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


def _own_tokens(tensors: PackTensors) -> Tensor | slice:
    """Which of the tokens that this process has of a pack are the pack's own: others make shares equally long."""
    if not isinstance(tensors, PartTensors) or tensors.share is None or tensors.on_host is None:
        return slice(None)
    places = torch.cat([torch.arange(start, end) for start, end in tensors.share.pieces])
    return (places < len(tensors.on_host)).to(tensors.ids.device)


def _added_to(total: Tensor, counted: Sequence[Tensor | slice]) -> Callable[..., None]:
    """A hook that adds up the cosines of one row's tokens, those that are `counted` by its only item."""

    def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        before = arguments[0] if arguments else keywords["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosines_BT = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        total.add_(cosines_BT[:, counted[0]].sum().double())

    return add

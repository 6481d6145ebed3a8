"""Activation checkpointing: what a layer made in its forward pass is forgotten, and made again for its backward pass.

It changes memory and time, never a number: the same operations run again on the same inputs with the same dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from training_hub.backends.shared.host_memory import free_host_gib

NONE, SELECTIVE, FULL = "none", "selective", "full"
HOW = (NONE, SELECTIVE, FULL)
"""What is kept of a layer: everything; its input and the results of its products and of torch's attention; its input.
Each takes less memory than the one before, and more time."""

OFFLOAD = "offload"
"""Of a layer its input is kept, beside the device: in page-locked memory of the host."""

KEEPS_PRODUCTS = "training_hub_keeps_products"
"""Attribute of a module within a layer whose products are kept: nobody may add to what one of them has made."""

MEMORY_BUDGET = "memory_budget"
"""Compiled blocks keep what the compiler finds cheapest within a budget; layers themselves do nothing."""

USABLE = 0.92
"""Share of free memory that a plan may fill; the rest is for what an allocator loses between blocks."""

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "mkldnn._linear_pointwise", "training_hub.mm")
ATTENTIONS = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "torch_attn._varlen_attn",
)

Away = Callable[[], AbstractContextManager[Any]]
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint_layers(model: nn.Module, how: str, contexts: Contexts | None = None, away: Away | None = None) -> bool:
    """Let every decoder layer of a transformers model forget as `how` says, in place; False where it has none.

    contexts: for `selective`, what is entered in forward and in recomputing in place of the one that keeps products.
    away: for `offload`, what is entered in place of the one that moves tensors to the host.
    """
    options: dict[str, Any] = {"context_fn": contexts or keeping_products} if how == SELECTIVE else {}
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False, **options)
    layers = list(_layers(model))
    for layer in layers:
        layer.gradient_checkpointing = how not in (NONE, MEMORY_BUDGET)
        layer._gradient_checkpointing_func = partial(_inputs_away, away or to_host, run) if how == OFFLOAD else run
        for module in layer.modules():
            setattr(module, KEEPS_PRODUCTS, how == SELECTIVE)
    return bool(layers)


def to_host() -> AbstractContextManager[Any]:
    """What autograd keeps is moved to the host's memory, and back for the backward pass."""
    return save_on_cpu(pin_memory=torch.cuda.is_available())


def _inputs_away(away: Away, run: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    # The layer itself runs within the hooks of its checkpoint, which keep nothing: what is away are its inputs.
    with away():
        return run(layer, *inputs)


def way_problem(how: str, device: torch.device) -> str | None:
    """Why layers cannot forget so on this device, and what to write."""
    if how != OFFLOAD or device.type == "cuda":
        return None
    return (
        f"training.activation_checkpointing: {how}: there is no GPU here whose memory it could spare. Write full, "
        "which keeps as much."
    )


def layers_of(model: nn.Module) -> list[Any]:
    """The decoder layers of a transformers model, the lowest first; [] where it has none that are known as such."""
    return list(_layers(model))


def num_layers(model: nn.Module) -> int:
    """Layers that can forget what they made."""
    return sum(1 for _ in _layers(model))


def _layers(model: nn.Module) -> Iterator[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def keeping_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts under which the results of products and of attention are kept, and the rest is made again."""
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = create_selective_checkpoint_contexts(
        _policy
    )
    return contexts


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def is_kept(operation: Any) -> bool:
    """Whether `selective` keeps what this operation of torch made."""
    name = str(operation).rpartition(".")[0]
    return name in PRODUCTS or name in ATTENTIONS


def free_gib(device: torch.device) -> float | None:
    """Memory that this process has or can have on the device; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) / 2**30
    return free_host_gib()

"""Which gradients a backward pass is made for."""

from __future__ import annotations

from typing import Any

import torch


def wanted(ctx: Any) -> tuple[bool, ...]:
    """Of each input of a function of ours, whether the pass that asks for its backward goes on to a gradient of it.

    `ctx.needs_input_grad` says what was so in forward: where a pass is made for activations alone and another for
    weights, as in some orders of a pipeline, it would have each of them make both.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return needs
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of those inputs that need one, in order
    return tuple(one and _is_reached(next(nodes)) for one in needs)


def _is_reached(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch does not tell of a leaf whose gradient is what it was asked for
        return True

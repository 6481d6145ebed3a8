"""How a process runs its part of a divided model on shapes alone: exchanges change shapes there, and send nothing."""

# B rows of a batch, T tokens, L tokens of one process, D width of the model, x any sizes

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.fused.exchange import made
from training_hub.backends.torch_engine.layouts.cut import Ends, own_weight, planned_stages
from training_hub.backends.torch_engine.layouts.exchanges import TOKENS
from training_hub.backends.torch_engine.layouts.sequence import slice_tokens
from training_hub.backends.torch_engine.layouts.split_linear import run_split
from training_hub.backends.torch_engine.layouts.tensor import closed_regions, split_layers, tensor_plan
from training_hub.backends.torch_engine.layouts.tokens import ENTERED, Entered, Tokens, num_tokens, on_entry
from training_hub.recipe.parallelism import Parallelism


class _Resized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int) -> Tensor:
        ctx.shape = x.shape
        shape = list(x.shape)
        shape[dim] = size
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0].new_empty(ctx.shape), None, None


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    """What comes of `x` in an exchange after which dimension `dim` is of another size."""
    result: Tensor = _Resized.apply(x, dim, size)
    return result


class ShapesOfTokens(Tokens):
    """Tokens between split products, of which each of `among` processes has a slice."""

    def __init__(self, among: int):
        mesh: Any = None  # exchanges of a backward pass ask for it, which shapes have none of
        super().__init__(mesh, are_sliced=True)
        self.among = among

    def enter(self, hidden: Tensor, length: int | None = None) -> Tensor:
        """[B, T, D], of [B, L, D]."""
        entered = self.join(hidden, length)
        setattr(entered, ENTERED, Entered(hidden.detach(), self.mesh, entered.shape[TOKENS]))
        return entered

    def leave(self, summands: Tensor) -> Tensor:
        """[B, L, D], of [B, T, D]."""
        return self.part(summands)

    def join(self, hidden: Tensor, length: int | None = None) -> Tensor:
        """[B, T, D], of [B, L, D]."""
        return resized(hidden, TOKENS, self.among * hidden.shape[TOKENS] if length is None else length)

    def part(self, hidden: Tensor) -> Tensor:
        """[B, L, D], of [B, T, D]."""
        return resized(hidden, TOKENS, -(-hidden.shape[TOKENS] // self.among))


def slice_shapes(model: Any, among: int) -> None:
    """Let a model without contents, whose split weights are already a process's part, run on slices of the tokens as
    `split_tensors` and `slice_tokens` would let it, in place."""
    tokens = ShapesOfTokens(among)
    for name, style, _ in list(split_layers(model)):
        if not style.is_apart:
            run_split(model, name, style, tokens, enters=False)
    for name in closed_regions(model, tensor_plan(model)):
        on_entry(model.get_submodule(name), lambda hidden, keywords: tokens.enter(hidden, num_tokens(keywords)))
    slice_tokens(model, tokens)


def layers_at(model: Any, asked: Parallelism, place: int) -> Any:
    """A copy of a model, over the same weights, of what the process at this place of its pipeline has."""
    ends, stages = Ends.of(model), planned_stages(model, asked)
    assert ends is not None
    copied = copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *model.buffers())})
    layers, own = copied.get_submodule(ends.layers), stages.of_process(place)
    kept = nn.ModuleList(layers[number] for stage in own for number in stages.layers(stage))
    copied.set_submodule(ends.layers, kept)
    copied.config.get_text_config().num_hidden_layers = len(kept)
    is_first, is_last = stages.owners[0] == place, stages.owners[-1] == place
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = own_weight(head) is own_weight(table)
    if not (is_first or (is_tied and is_last)):
        _empty(copied, ends.table)
    if not is_last:
        copied.set_submodule(ends.norm, nn.Identity())
        _empty(copied, ends.head)
    return copied


def _empty(model: nn.Module, name: str) -> None:
    """Leave in the place of the module of this name the library's own, without rows in its weights, and no adapter."""
    module = model.get_submodule(name)
    for inside in ("original_module", "base_layer"):  # PEFT's words
        module = getattr(module, inside, module)
    rows = {
        key: None if one is None else nn.Parameter(one.detach()[:0], one.requires_grad)
        for key, one in module._parameters.items()
    }
    model.set_submodule(name, made(type(module), {**vars(module), "_parameters": rows}))

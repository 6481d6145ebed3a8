"""Sequence parallelism: which modules of a transformers model see a slice of the tokens, and which all of them.

From the first layer's input to the last norm's output each rank has a slice. Attention and MLPs whose weights are split
gather where they begin and scatter where they end (`tensor.py`); attention that is whole all ranks compute alike; the
rest goes token by token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.fused.exchange import OnKernels, made
from training_hub.backends.torch_engine.layouts.context import SAME_LOSS, STATEFUL, made_up_pack
from training_hub.backends.torch_engine.layouts.cut import is_midway
from training_hub.backends.torch_engine.layouts.fully_sharded import blocks_of
from training_hub.backends.torch_engine.layouts.split_linear import STYLES
from training_hub.backends.torch_engine.layouts.tensor import closed_regions, general, tensor_plan
from training_hub.backends.torch_engine.layouts.tokens import POSITIONS, Tokens, num_tokens, on_entry, on_exit
from training_hub.backends.torch_engine.preflight import ROUGH, evaluating, relative_difference
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.errors import RecipeError

SETTING = "parallelism.sequence_parallel"


def slice_tokens(model: Any, tokens: Tokens) -> frozenset[str]:
    """Let the layers of a model that is split over heads see slices of the tokens, in place.

    Gives the names of weights that each rank has whole and uses on its own slice. What `slice_problems` refuses must
    not come here.
    """
    _restore(model, blocks_of(model)[-1])
    layers, decoder = blocks_of(model), _decoder_of(model)
    assert decoder is not None
    on_entry(layers[0], lambda hidden, keywords: tokens.part(hidden))
    whole = _whole_attention(model)
    for name in whole:
        on_entry(model.get_submodule(name), lambda hidden, keywords: tokens.join(hidden, num_tokens(keywords)))
        on_exit(model.get_submodule(name), tokens.part)
    decoder.register_forward_hook(_joining(model, tokens), with_kwargs=True)
    inside = {id(weight) for name in whole for weight in model.get_submodule(name).parameters()}
    sliced = {id(weight) for module in (*layers, *_around(model)) for weight in module.parameters()}
    return frozenset(
        name
        for name, weight in model.named_parameters()
        if id(weight) in sliced - inside and not isinstance(weight, DTensor)
    )


def _restore(model: Any, layer: nn.Module) -> None:
    """Let the last layer be its library's: ours keeps the tokens that are trained, which lie in all slices."""
    kind: Any = type(layer)
    if issubclass(kind, OnKernels):
        name = next(name for name, module in model.named_modules() if module is layer)
        model.set_submodule(name, made(kind.__bases__[1], layer.__dict__))


def _joining(model: Any, tokens: Tokens) -> Any:
    def join(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        if is_midway(model):
            return output
        given = (keywords.get("input_ids"), keywords.get("inputs_embeds"), *arguments)
        length = next(one for one in given if one is not None).shape[1]
        states: Tensor = tokens.join(output[0], length)
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    return join


def slice_problems(model: Any) -> list[str]:
    """Why the layers of this model, which may lie on the meta device, cannot see slices of the tokens."""
    reason = next(_reasons(model), None)
    return [f"{SETTING}: {type(model).__name__} {reason}. Write false."] if reason else []


def _reasons(model: Any) -> Iterator[str]:
    layers, config = blocks_of(model), model.config.get_text_config()
    stateful = [kind for kind in getattr(config, "layer_types", None) or () if any(word in kind for word in STATEFUL)]
    if stateful:
        yield f"has layers that hand a state from token to token ({stateful[0]})"
    if not layers or _decoder_of(model) is None:
        yield "has no list of layers, the first of which could cut the tokens"
        return
    strange = [type(module).__name__ for module in _around(model) if not _is_norm(module)]
    if strange:
        yield f"has a {strange[0]} beside its layers, of which is not known which tokens it wants"
    plan = tensor_plan(model)
    split = {name.rpartition(".")[0] for name, style in plan.items() if style in STYLES and _within(model, name)}
    for name in sorted(split - set(closed_regions(model, plan))):
        yield f"has weights in {general(name)} that are not split beside some that are"
    for name in _attention(model):
        if POSITIONS not in inspect.signature(model.get_submodule(name).forward).parameters:
            yield f"does not tell {general(name)} the positions of its tokens"


def _decoder_of(model: nn.Module) -> nn.Module | None:
    """The module that runs one layer after another."""
    first = next(iter(blocks_of(model)), None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    wanted = next((one for one in lists if len(one) and one[0] is first), None)
    return next((module for module in model.modules() if wanted in list(module.children())), None)


def _around(model: Any) -> list[nn.Module]:
    """What the decoder holds beside layers and the table of embeddings, as far as it has weights."""
    decoder, layers = _decoder_of(model), set(blocks_of(model))
    assert decoder is not None
    return [
        module
        for module in decoder.children()
        if module is not model.get_input_embeddings() and not layers & set(module.children()) and _has_weights(module)
    ]


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _within(model: nn.Module, name: str) -> bool:
    """Whether a module of this name lies in a layer."""
    return any(name.startswith(f"{layer}.") for layer in _names(model, blocks_of(model)))


def _attention(model: Any) -> list[str]:
    """The attention modules of all layers, by name."""
    return [
        f"{name}.{key}"
        for name in _names(model, blocks_of(model))
        for key, module in model.get_submodule(name).named_children()
        if any(word in key for word in ("attn", "attention")) and _has_weights(module) and not _is_norm(module)
    ]


def _whole_attention(model: Any) -> list[str]:
    """Those of them whose weights the plan leaves whole."""
    plan = tensor_plan(model)
    return [name for name in _attention(model) if not any(other.startswith(f"{name}.") for other in plan)]


def _names(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    wanted = {id(module) for module in modules}
    return [name for name, module in model.named_modules() if id(module) in wanted]


@torch.no_grad()
def refuse_other_loss(model: Any, objective: Any, tokens: Tokens, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RecipeError where a small pack has another loss in slices than whole. dtype: what the model computes in."""
    one = to_device(made_up_pack(model), device)
    with evaluating(model):
        sliced = objective(model, one).total
        with tokens.whole():
            whole = objective(model, one).total
    difference, limit = relative_difference(sliced, whole), SAME_LOSS.get(dtype, ROUGH)
    if not difference <= limit:
        raise RecipeError(
            f"{SETTING}: {type(model).__name__} finds another loss where ranks have slices of the tokens (off by "
            f"{difference:.1e}, allowed {limit:.0e}): it looks at other tokens outside of attention. Write false."
        )

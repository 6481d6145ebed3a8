"""Let the modules of a loaded model run on the kernels, without touching what they are called or hold.

A module is replaced by one of a subclass of its own class that shares its parameters and children. Only `forward` is
ours, and it hands back to the library what the kernels do not do. Whether the model still says the same is measured.
"""

# B rows, T tokens, D width of a head

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.fused import eight_bit, functions, onednn, panels
from training_hub.backends.torch_engine.fused.exchange import Forward, OnKernels, made, runs, subclass
from training_hub.backends.torch_engine.fused.layers import LAYERS, NORM_OFFSETS, last_layer, layer, norm, only
from training_hub.backends.torch_engine.fused.low_rank import ACROSS, project
from training_hub.backends.torch_engine.fused.products import linear
from training_hub.backends.torch_engine.loading.quantization import PACKED
from training_hub.backends.torch_engine.preflight import ROUGH, SAME_LOGITS, logits_of_one, relative_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATED = ("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "Granite", "Cohere", "SmolLM3", "Qwen3Moe", "DeepseekV3")
"""Families whose MLP is down(act(gate(x)) * up(x)); swapped where act is SiLU."""

WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "Llama": lambda module: None,
    "Granite": lambda module: None,
    "Mistral": lambda module: getattr(module.config, "sliding_window", None),
    "Qwen2": lambda module: module.sliding_window,
    "Qwen3": lambda module: module.sliding_window,
}
"""Families whose attention projects, turns by rotary positions, attends and projects; and where each has its window."""


OURS = "training_hub_"
"""How the names of our own attention functions begin."""

LAST_LAYERS = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Those of `LAYERS` whose attention, which is ours, can keep wanted rows alone; their last layer does."""

WANTED_ROWS = "wanted_rows"
"""Keyword that a swapped decoder takes: the tokens whose states are wanted, [N] int64. Every layer sees it, the last
one heeds it and tells its attention which rows to keep."""


def run_on_kernels(model: PreTrainedModel) -> str | None:
    """Move what the kernels can do of this model onto them, in place; what a user should be told, if anything.

    The model is left as it was where that would change what it says beyond rounding.
    """
    if not functions.are_known(next(model.parameters())):
        return None
    problem = functions.problem_on(model.device)
    if problem is not None:
        what = "norms and rotary positions" if model.device.type == "cuda" else "attention, norms and loss"
        return f"{what} run without kernels of our own, which is slower: {problem}"
    before = logits_of_one(model)
    swap(model)
    difference = relative_difference(logits_of_one(model), before)
    if difference <= SAME_LOGITS.get(model.dtype, ROUGH):
        return None
    swap_back(model)
    return f"norms and rotary positions run without kernels of our own: they change the logits by {difference:.1%}"


def _is_ours_alone(module: object) -> bool:
    """Whether the library cannot compute with what this layer has: bytes, or parts of what DoRA takes lengths of."""
    return any(hasattr(one, PACKED) for one in (module, getattr(module, "base_layer", None))) or hasattr(module, ACROSS)


def stay_on_kernels(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Keep a model that is divided since `swap` on the kernels, if it says the same without; else what a user should be
    told. It cannot be swapped back: its modules then run the library's forward in place of ours."""
    swapped = [one for one in model.modules() if isinstance(one, OnKernels) and not _is_ours_alone(one)]
    if not swapped:
        return None
    ours = logits_of_one(model)
    for module in swapped:
        made_of: Any = next(kind for kind in type(module).__mro__ if "made_by" in vars(kind))
        vars(module)["forward"] = MethodType(made_of.__bases__[1].forward, module)
    difference = relative_difference(ours, logits_of_one(model))
    if difference > SAME_LOGITS.get(dtype, ROUGH):
        return f"norms and rotary positions run without kernels of our own: they change the logits by {difference:.1%}"
    for module in swapped:
        del vars(module)["forward"]
    return None


def swap(model: nn.Module) -> None:
    """Replace every module that the kernels can run, in place; parameters and names stay."""
    head = _head_of(model)
    for name, module in list(model.named_modules()):
        kind = None if isinstance(module, OnKernels) or module in head else _kind_for(module)
        if kind is not None:
            model.set_submodule(name, made(kind, module.__dict__))


def _head_of(model: Any) -> frozenset[nn.Module]:
    """The layer that makes logits, whose loss is taken elsewhere, with what an adapter has put around it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return frozenset(() if head is None else head.modules())


def multiply_in_eight_bits(model: nn.Module) -> int:
    """Let linear layers but the head multiply in 8-bit floating point, in place; how many do."""
    head = _head_of(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in head and eight_bit.fits(module.weight)
    ]
    for name, module in found:
        model.set_submodule(name, made(subclass(nn.Linear, _eight_bit_linear), module.__dict__))
    return len(found)


def gives_wanted_rows(decoder: nn.Module) -> bool:
    """Whether this decoder takes WANTED_ROWS, and then returns [1, N, D] for these tokens alone."""
    layers = getattr(decoder, "layers", None)
    return isinstance(layers, nn.ModuleList) and runs(layers[-1], last_layer)


def has_swapped_attention(decoder: nn.Module) -> bool:
    """Whether the layers of this decoder attend by our forward, which takes `no_mask` for none."""
    found = [module for module in decoder.modules() if type(module).__name__.endswith("Attention")]
    return bool(found) and all(isinstance(module, OnKernels) and "forward" not in vars(module) for module in found)


def is_ours(module: Any) -> bool:
    """Whether this module of a transformers model attends by one of our functions."""
    return bool(module.config._attn_implementation.startswith(OURS))


def takes_no_mask(decoder: nn.Module) -> bool:
    """Whether this decoder attends by our functions and hands them `no_mask` as it is."""
    names = {
        kind.__name__.removesuffix("Model").removesuffix("Text")
        for kind in type(decoder).__mro__
        if kind.__module__.startswith("transformers.models.")
    }
    return not names.isdisjoint(NORM_OFFSETS) and is_ours(decoder)


def no_mask(device: torch.device) -> Tensor:
    """An attention mask that says nothing, for a decoder that attends by our functions.

    With none at all transformers looks for packed documents in the positions, and has a GPU's host wait for the answer
    in each forward pass; a mask of four dimensions it passes on as it is.
    """
    return torch.empty(1, 1, 0, 0, device=device)


def swap_back(model: nn.Module) -> None:
    """Undo `swap`."""
    for name, module in list(model.named_modules()):
        kind: Any = type(module)
        if issubclass(kind, OnKernels) and not _is_ours_alone(module):
            model.set_submodule(name, made(kind.__bases__[1], module.__dict__))


def _kind_for(module: nn.Module) -> type | None:
    own: Any = type(module)
    if own is nn.Linear and _multiplies_faster(module.weight):
        return subclass(own, _linear)
    if not own.__module__.startswith("transformers.models."):
        return None
    if own.__name__.endswith("RMSNorm") and own.__name__[:-7] in NORM_OFFSETS and hasattr(module, "weight"):
        return subclass(own, norm)
    if own.__name__.endswith("MLP") and own.__name__[:-3] in GATED and _is_silu(module):
        return subclass(own, _gated)
    if own.__name__.endswith("Attention") and own.__name__[:-9] in WINDOWS:
        return subclass(own, _attention)
    if own.__name__.endswith("DecoderLayer") and own.__name__[:-12] in LAYERS:
        return subclass(own, last_layer if own.__name__[:-12] in LAST_LAYERS and _is_last(module) else layer)
    return None


def _multiplies_faster(weight: Any) -> bool:
    """Whether `products.linear` may be faster by this weight than torch, in forward or in backward. One without
    contents may come to lie on a CPU; elsewhere nothing is lost."""
    if weight.is_cuda:
        return weight.dtype == torch.bfloat16
    return panels.is_trusted(weight.dtype) or (weight.dtype == torch.float32 and onednn.is_trusted())


def _is_last(module: Any) -> bool:
    return module.self_attn.layer_idx == module.self_attn.config.num_hidden_layers - 1


def _is_silu(module: Any) -> bool:
    return type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


def _linear(own: Any) -> Forward:
    def forward(self: Any, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    return forward


def _eight_bit_linear(own: Any) -> Forward:
    def forward(self: Any, input: Tensor) -> Tensor:
        return eight_bit.linear(input, self.weight, self.bias)

    return forward


def _gated(own: Any) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not functions.are_known(x):
            return own.forward(self, x)
        return self.down_proj(functions.swiglu(*project(x, (self.gate_proj, self.up_proj))))

    return forward


def _attention(own: Any) -> Forward:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    window = WINDOWS[own.__name__[:-9]]

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        kept_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None and not attention_mask.numel():
            attention_mask = None
        implementation = self.config._attn_implementation
        takes_over = attention_mask is None and past_key_values is None and is_ours(self)
        is_known = position_embeddings is not None and _are_turnable(self, hidden_states, *position_embeddings)
        if not (takes_over and is_known):
            output, shares = own.forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return only(output, kept_rows), shares
        assert position_embeddings is not None
        query, key, value = _turned_heads(self, hidden_states, *position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
        output, _ = attend(
            self, query, key, value, None, scaling=self.scaling, dropout=dropout, sliding_window=window(self), **kwargs
        )
        return self.o_proj(only(output.reshape(*hidden_states.shape[:-1], -1), kept_rows)), None

    return forward


def _are_turnable(module: Any, hidden: Tensor, cosines: Tensor, sines: Tensor) -> bool:
    return functions.are_known(hidden, cosines, sines) and cosines.shape[-1] == module.head_dim


def _turned_heads(module: Any, hidden_BTx: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, T, D], the first two turned by their rotary positions."""
    shape = (*hidden_BTx.shape[:-1], -1, module.head_dim)
    parts = project(hidden_BTx, (module.q_proj, module.k_proj, module.v_proj))
    query, key, value = (part.view(shape) for part in parts)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = functions.rotate(query, cosines, sines), functions.rotate(key, cosines, sines)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

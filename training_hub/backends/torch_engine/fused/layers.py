"""Norms, and decoder layers in which a norm and the residual sum it reads share one pass over memory.

h = x + attention(norm(x)), then h + mlp(norm(h)). h and its norm are written in one pass; backward, the gradient that
came through a norm and the one that went around it are added where the former is made. By itself stays the last sum of
a layer, which the norm of the next one reads: it is what layers hand to each other, and what hooks, checkpoints and
stages hold on to. Of 11 passes over a tensor [T, D] for each norm, sum and gradient that leaves 8 and a half.
"""

# B rows, T tokens, D width of the model

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.fused import functions
from training_hub.backends.torch_engine.fused.exchange import Forward, runs

NORM_OFFSETS = {
    **dict.fromkeys(("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "Phi3", "Granite", "SmolLM3"), 0.0),
    **dict.fromkeys(("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "GptOss", "Olmo2"), 0.0),
    **dict.fromkeys(("Gemma", "Gemma2", "Gemma3"), 1.0),
}
"""Families whose RMSNorm the kernel computes, and what it adds to their weight."""

LAYERS = (
    *("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Qwen2Moe", "Qwen3Moe", "DeepseekV3"),
)
"""Families whose layer is h = x + attention(norm(x)), then h + mlp(norm(h))."""


def norm(own: Any) -> Forward:
    offset = NORM_OFFSETS[own.__name__[:-7]]

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not functions.are_known(hidden_states, self.weight):
            return own.forward(self, hidden_states)
        return functions.rms_norm(hidden_states, self.weight, _eps(self), offset)

    return forward


def layer(own: Any) -> Forward:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return _through(self, hidden_states, None, kwargs)

    return forward


def last_layer(own: Any) -> Forward:
    """What the last layer says is read at trained tokens only, so its products after attention are theirs alone.

    Of a model of 8 layers on chats in which 57 % of the tokens are trained, that is 4 % of all operations.
    """

    def forward(self: Any, hidden_states: Tensor, wanted_rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        if wanted_rows is None:
            return _through(self, hidden_states, None, kwargs)
        return _through(self, hidden_states, wanted_rows, {**kwargs, "kept_rows": wanted_rows})

    return forward


def only(x_BTx: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of [B, T, ...], or all."""
    return x_BTx if rows is None else x_BTx.index_select(1, rows)


def _through(module: Any, x_BTD: Tensor, rows: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    x_BTD, normed = _beside(module.input_layernorm, x_BTD)
    attended, _ = module.self_attn(hidden_states=normed, **kwargs)
    x_BTD, normed = _added(module.post_attention_layernorm, only(x_BTD, rows), attended)
    made: Tensor = x_BTD + module.mlp(normed)
    return made


def _beside(normalise: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x, and what a norm makes of it."""
    if not _is_kernels(normalise, x):
        return x, normalise(x)
    return functions.norm_beside(x, normalise.weight, _eps(normalise), _offset(normalise))  # type: ignore[arg-type]


def _added(normalise: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """x + delta, and what a norm makes of it."""
    if not _is_kernels(normalise, x, delta):
        total = x + delta
        return total, normalise(total)
    return functions.add_norm(x, delta, normalise.weight, _eps(normalise), _offset(normalise))  # type: ignore[arg-type]


def _is_kernels(normalise: Any, *inputs: Tensor) -> bool:
    """Whether this module would do no more than to run the kernel on such inputs: what else hangs on it must run."""
    hooks = (normalise._forward_hooks, normalise._forward_pre_hooks, normalise._backward_hooks)
    if not runs(normalise, norm) or any((*hooks, normalise._backward_pre_hooks)):
        return False
    is_plain = not any(isinstance(one, DTensor) for one in (normalise.weight, *inputs))
    return is_plain and functions.are_known(*inputs, normalise.weight)


def _offset(normalise: Any) -> float:
    return NORM_OFFSETS[type(normalise).__name__[:-7]]


def _eps(normalise: Any) -> float:
    return float(normalise.variance_epsilon if hasattr(normalise, "variance_epsilon") else normalise.eps)

"""Attention that keeps the documents of a pack apart, registered through transformers' own interface.

Three names. DOCUMENTS hands the pack to our own kernel on a CPU that has it, and elsewhere calls
scaled_dot_product_attention once per document, or once per group of documents of equal length. CUDNN is the same with
cuDNN's kernel first (CUDA). VARLEN hands the whole pack to torch's variable-length kernel (CUDA) and falls back to
DOCUMENTS for a layer the kernel cannot do. Which is fastest is tried at the start (attention_trial.py). None of them
builds a mask over the pack: that would cost T x T memory, and SDPA leaves its fast kernels as soon as it is given one.

Only the training call comes here. Padding or a cache (generation) goes to transformers' SDPA with transformers' mask.
"""

# B rows, T tokens, Q query heads, K key-value heads, G = Q / K, D width of a query head, E width of a value head

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention

from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.fused.functions import are_fit
from training_hub.backends.torch_engine.fused.functions import attention as kernel_attention
from training_hub.errors import BackendError

DOCUMENTS = "training_hub_documents"
VARLEN = "training_hub_varlen"
CUDNN = "training_hub_documents_cudnn"


LEFT_OUT_BY_SDPA = ("attn_logit_softcapping",)
"""Settings of a config that transformers' fused attention leaves out without a word; its plain one does them. Where
nobody chooses, transformers 5.17 takes the fused one all the same."""


def register_attention() -> None:
    """Make all names known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, attend in FUNCTIONS.items():
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, training_mask)


def attention_of_transformers(model: Any) -> str:
    """The attention of transformers' own that does all that this architecture wants: fused, or plain where that leaves
    some out."""
    text = model.config.get_text_config()
    is_whole = all(getattr(text, name, None) is None for name in LEFT_OUT_BY_SDPA)
    return "sdpa" if model._supports_sdpa and is_whole else "eager"


def training_mask(
    *args: Any, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask for a training call; transformers' SDPA mask for one with padding or a cache."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(*args, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


@dataclass(frozen=True)
class Rule:
    """How one layer attends: all that a model passes beside queries, keys and values."""

    scaling: float
    window: int | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks_Q: Tensor | None = None
    bias: Tensor | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether the scores have to be spelled out, since no fused kernel of torch does this."""
        return self.softcap is not None or self.sinks_Q is not None or self.bias is not None


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document: [B, T, Q, E].

    From query [B, Q, T, D], key [B, K, T, D], value [B, K, T, E]. `document_lengths` sums to T and needs B = 1; without
    it each row is one document.
    """
    attention_mask = _told(attention_mask)
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return _transformers_sdpa(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    rule = _rule(module, query, scaling, dropout, kwargs)
    if query.shape[0] == 1 and _kernel_does(rule, query, key, value):
        lengths = document_lengths or (query.shape[2],)
        return kernel_attention(query, key, value, lengths, rule.scaling, rule.window), None
    if document_lengths is None or len(document_lengths) == 1:
        return _attend(query, key, value, rule).transpose(1, 2).contiguous(), None
    if query.shape[0] != 1:
        raise ValueError(f"document_lengths describes one row, but the batch has {query.shape[0]}.")
    if rule.bias is None and len(set(document_lengths)) == 1:
        return _attend_alike(query, key, value, rule, len(document_lengths)), None
    return _attend_each(query, key, value, rule, document_lengths), None


def _told(mask: Tensor | None) -> Tensor | None:
    """The mask, None for one that says nothing: an empty one keeps transformers from looking for one by itself."""
    return mask if mask is not None and mask.numel() else None


def _transformers_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("s_aux") is not None:
        raise BackendError(
            "This model has attention sinks, which SDPA would leave out: call model.set_attn_implementation('eager') "
            "before generating or running padded batches."
        )
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _rule(module: nn.Module, query: Tensor, scaling: float | None, dropout: float, kwargs: dict[str, Any]) -> Rule:
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise BackendError(
            f"{type(module).__name__} looks at later tokens too, so the model cannot learn to predict the next one: "
            "choose a causal language model."
        )
    return Rule(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        dropout=dropout,
        softcap=kwargs.get("softcap"),
        sinks_Q=kwargs.get("s_aux"),
        bias=kwargs.get("position_bias"),
    )


def _kernel_does(rule: Rule, *parts: Tensor) -> bool:
    """Whether our kernel can attend by this rule.

    Where it can it is taken for every length: on one core with AVX-512, 8 over 4 heads of 64, forward and backward took
    35 ms against 93 of SDPA for 16 documents of 90 to 260 tokens, 91 against 126 for two of 1,024 and 690 against 764
    for one of 4,096 (bfloat16; float32 likewise).
    """
    is_simple = not (rule.needs_scores or rule.dropout)
    return is_simple and are_fit(*parts) and all(part.stride(-1) == 1 for part in parts) and kernels() is not None


def late_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """Causal attention of the last tokens of one document to all of it: [1, t, Q, E].

    From query [1, Q, t, D] of t tokens, key [1, K, T, D] and value [1, K, T, E] of T, the last of which are the same.
    """
    rule = _rule(module, query, scaling, dropout, kwargs)
    if rule.bias is not None:
        raise BackendError(
            f"{type(module).__name__} adds a bias to each pair of positions, of which it has only a part."
        )
    if query.shape[2] == key.shape[2] and _kernel_does(rule, query, key, value):
        return kernel_attention(query, key, value, (query.shape[2],), rule.scaling, rule.window)
    return _attend(query, key, value, rule).transpose(1, 2)


def _attend_alike(query: Tensor, key: Tensor, value: Tensor, rule: Rule, documents: int) -> Tensor:
    """[1, T, Q, E]: documents that are all of one length are rows of a batch, which takes no copy."""
    query, key, value = (
        part.transpose(1, 2).reshape(documents, -1, part.shape[1], part.shape[3]).transpose(1, 2)
        for part in (query, key, value)
    )
    attended = _attend(query, key, value, rule).transpose(1, 2)
    return attended.reshape(1, -1, *attended.shape[2:])


def _attend_each(query: Tensor, key: Tensor, value: Tensor, rule: Rule, lengths: Sequence[int]) -> Tensor:
    """[1, T, Q, E]: documents of equal length share a call.

    `split` and `cat` have each other as backward. Slices would each write a gradient as long as the pack.
    """
    sizes = list(lengths)
    queries, keys, values = query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)
    starts = list(accumulate(sizes, initial=0))
    # A position bias may differ between documents of equal length, so that these cannot share a call.
    groups = _equal_lengths(sizes) if rule.bias is None else [[index] for index in range(len(sizes))]
    outputs: dict[int, Tensor] = {}
    for members in groups:
        inside = _inside(rule, starts[members[0]], sizes[members[0]])
        attended = _attend(_join(queries, members), _join(keys, members), _join(values, members), inside)
        outputs.update(zip(members, attended.transpose(1, 2).split(1), strict=True))
    return torch.cat([outputs[index] for index in range(len(sizes))], dim=1)


def _join(parts: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    return torch.cat([parts[index] for index in members]) if len(members) > 1 else parts[members[0]]


def _equal_lengths(lengths: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return list(groups.values())


def _inside(rule: Rule, start: int, length: int) -> Rule:
    """The rule with its position bias cut to one document."""
    if rule.bias is None:
        return rule
    return replace(rule, bias=rule.bias[..., start : start + length, start : start + length])


def _attend(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """[B, Q, T, E] for B documents of equal length, whole, or the last T tokens of each with the keys of all."""
    if rule.needs_scores:
        return _scored(query, key, value, rule)
    width = value.shape[-1]
    if width < query.shape[-1]:
        # The fused kernels want equal widths; zeros beside the values come out as zeros and are cut off again.
        value = pad(value, (0, query.shape[-1] - width))
    return _fused(query, key, value, rule)[..., :width]


def _fused(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    length, keys = query.shape[2], key.shape[2]
    banded = (rule.window is not None and keys > rule.window) or keys > length
    mask = _band(length, keys, rule.window, query.device) if banded else None
    if query.is_cuda or query.shape[1] == key.shape[1]:
        return scaled_dot_product_attention(
            query, key, value, mask, rule.dropout, not banded, scale=rule.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return _fused_groups(query, key, value, mask, rule)


def _fused_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Grouped queries without copying keys: the G queries of a key become rows, over which the keys repeat by stride 0.

    On a CPU torch's `enable_gqa` took twice the time at 128 tokens and the same from 512 on (8 over 2 heads, float32).
    """
    rows, heads, length, width = query.shape
    shared, keys = rows * key.shape[1], key.shape[2]
    group = heads // key.shape[1]
    query_GKTD = query.reshape(shared, group, length, width).transpose(0, 1)
    key_GKTD = key.reshape(shared, keys, width).expand(group, shared, keys, width)
    value_GKTE = value.reshape(shared, keys, -1).expand(group, shared, keys, value.shape[-1])
    output = scaled_dot_product_attention(
        query_GKTD, key_GKTD, value_GKTE, mask, rule.dropout, mask is None, scale=rule.scaling
    )
    return output.transpose(0, 1).reshape(rows, heads, length, value.shape[-1])


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] of bool: a token sees itself and what is before it, `window` tokens in all. The last query is
    the token of the last key."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return (back >= 0) & (back < (window or keys))


def _scored(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Attention spelled out, for soft caps (Gemma-2), sinks (gpt-oss) and position biases; softmax in float32."""
    rows, heads, length, width = query.shape
    kv_heads, keys = key.shape[1:3]
    query_BKGTD = query.reshape(rows, kv_heads, heads // kv_heads, length, width)
    scores = (query_BKGTD @ key[:, :, None].transpose(-1, -2) * rule.scaling).reshape(rows, heads, length, keys)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if rule.bias is not None:
        scores = scores + rule.bias
    scores = scores.masked_fill(~_band(length, keys, rule.window, query.device), float("-inf"))
    shares = _softmax(scores, rule.sinks_Q).to(value.dtype)
    shares = drop(shares, rule.dropout) if rule.dropout else shares
    shares_BKGTT = shares.reshape(rows, kv_heads, heads // kv_heads, length, keys)
    return (shares_BKGTT @ value[:, :, None]).reshape(rows, heads, length, value.shape[-1])


def _softmax(scores_BQTT: Tensor, sinks_Q: Tensor | None) -> Tensor:
    """Shares [B, Q, T, T]. A sink is one more score per head that takes a share and gives no value."""
    exact = torch.promote_types(scores_BQTT.dtype, torch.float32)
    if sinks_Q is None:
        return torch.softmax(scores_BQTT, -1, dtype=exact)
    rows, _, length, _ = scores_BQTT.shape
    sinks = sinks_Q.reshape(1, -1, 1, 1).expand(rows, -1, length, 1).to(scores_BQTT.dtype)
    return torch.softmax(torch.cat([scores_BQTT, sinks], -1), -1, dtype=exact)[..., :-1]


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same as `documents_attention`, in one kernel call for the whole pack."""
    if _told(attention_mask) is None and cu_seq_lens_q is not None and max_length_q is not None:
        rule = _rule(module, query, scaling, dropout, kwargs)
        if not (rule.needs_scores or dropout) and _kernel_takes(query, value):
            return _varlen(query, key, value, rule, cu_seq_lens_q, max_length_q), None
    return documents_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)


def _kernel_takes(query: Tensor, value: Tensor) -> bool:
    """Flash attention wants 16-bit numbers on CUDA, and heads of at most 256 whose width is a multiple of 8."""
    width = query.shape[-1]
    return query.is_cuda and query.element_size() == 2 and width <= 256 and width % 8 == 0 and value.shape[-1] <= width


def _varlen(query: Tensor, key: Tensor, value: Tensor, rule: Rule, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    width = value.shape[-1]
    query_TQD, key_TKD = query[0].transpose(0, 1), key[0].transpose(0, 1)
    value_TKD = pad(value[0].transpose(0, 1), (0, query.shape[-1] - width))
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _varlen_options():
            options["enable_gqa"] = True
        else:
            key_TKD, value_TKD = (
                part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key_TKD, value_TKD)
            )
    # The kernel counts the tokens to the left of the query, transformers counts the query as well.
    window = (-1, 0) if rule.window is None else (rule.window - 1, 0)
    output_TQD: Any = varlen_attn(
        query_TQD, key_TKD, value_TKD, cu_seqlens, cu_seqlens, longest, longest,
        scale=rule.scaling, window_size=window, **options,
    )  # fmt: skip
    return output_TQD[None, :, :, :width]


@lru_cache(maxsize=1)
def _varlen_options() -> frozenset[str]:
    """Arguments of `varlen_attn` in this torch: 2.10 has no window or scale, 2.11 no enable_gqa."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def cudnn_attention(module: nn.Module, *inputs: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """The same as `documents_attention`, where torch asks cuDNN before its other kernels."""
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    order = [getattr(SDPBackend, name) for name in names]
    with sdpa_kernel(order, set_priority=True):
        return documents_attention(module, *inputs, **kwargs)  # type: ignore[arg-type]


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    DOCUMENTS: documents_attention,
    VARLEN: varlen_attention,
    CUDNN: cudnn_attention,
}
"""Attention by the name that transformers knows it by."""


def varlen_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the variable-length kernel cannot be used here, with the remedy; None where it can."""
    remedy = "set model.attention to documents, or auto"
    if device.type != "cuda":
        return f"model.attention: varlen needs a CUDA device, this run is on {device.type}; {remedy}."
    if dtype not in (torch.bfloat16, torch.float16):
        return f"model.attention: varlen computes in bfloat16, model.dtype is {str(dtype)[6:]}; {remedy}."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"model.attention: varlen needs a GPU of compute capability 8.0 or newer; {remedy}."
    if not {"window_size", "scale"} <= _varlen_options():
        return f"model.attention: varlen needs torch 2.11 or newer, this is {torch.__version__}; {remedy}."
    return None

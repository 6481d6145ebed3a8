"""Tensor parallelism: heads, inner widths, experts and the vocabulary of a transformers model, split over ranks.

What is split how is read from the model's own plan (`base_model_tp_plan` of its config, `_tp_plan` of its class), which
is data. All ranks of a group see the same packs; what lies between the split products is the same on each, so that
norms, residuals and dropout are too, or a slice on each (`sequence.py`).
"""

# V vocabulary, D width of the model

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import gcd
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from training_hub.backends.torch_engine.fused.exchange import Forward
from training_hub.backends.torch_engine.fused.low_rank import ADAPTER, is_dora
from training_hub.backends.torch_engine.layouts.exchanges import leaving
from training_hub.backends.torch_engine.layouts.experts import bare, deal_out, experts_of
from training_hub.backends.torch_engine.layouts.shared import Rows, exchange, locally
from training_hub.backends.torch_engine.layouts.split_linear import (
    STYLES,
    Style,
    keep_slice,
    split_lengths,
    split_linear,
)
from training_hub.backends.torch_engine.layouts.tokens import Tokens, num_tokens, on_entry

HEAD_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise_gather_output": partial(ColwiseParallel, use_local_output=False),
    "rowwise_split_input": partial(
        RowwiseParallel, input_layouts=Replicate(), output_layouts=Partial(), use_local_output=False
    ),
}
"""Styles of the head, as transformers names them."""

SUMMED = "replicated_with_grad_allreduce"
"""A weight that each rank has whole and uses on its own heads, so that its gradient is the sum over the ranks."""

EXPERTS = "moe_tp_experts"
"""Experts of a layer. A plan says, as PACKED, how each is split; here they are dealt out whole."""

PACKED = "packed_colwise"

DEGREE = "parallelism.tensor_parallel_degree"

Plan = dict[str, str]


def tensor_plan(model: Any) -> Plan:
    """Styles by the name of the module or weight, of a model that may lie on the meta device; {} where it has none.

    The table of embeddings, which a plan may name or not, is split with the vocabulary all the same.
    """
    inner = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    patterns = {f"{model.base_model_prefix}.{name}": style for name, style in inner.items()}
    patterns |= getattr(type(model), "_tp_plan", None) or {}
    table = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is not table]
    return {name: patterns[general(name)] for name in names if general(name) in patterns}


def general(name: str) -> str:
    """The name with a star for each number: layers.3.mlp -> layers.*.mlp."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def tensor_problems(model: Any, degree: int, *, deals_experts: bool = True) -> list[str]:
    """Why this model, which may lie on the meta device, cannot be split over `degree` ranks; [] where it can.

    deals_experts: experts are dealt out to these ranks, too.
    """
    kind, plan = type(model).__name__, tensor_plan(model)
    if not any(style in STYLES for name, style in plan.items() if not _is_head(model, name)):
        return [f"{DEGREE}: {degree}, but transformers has no plan for {kind} that says how it is split. Write 1."]
    strange = {style for name, style in plan.items() if not _is_known(style)}
    odd = list(_odd_modules(model, plan))
    if strange or odd:
        what = (
            f"in styles that are not known here ({', '.join(sorted(strange))})"
            if strange
            else f"of kinds that are not: {', '.join(odd[:3])}"
        )
        return [f"{DEGREE}: {degree}, but the plan of {kind} splits parts {what}. Write 1."]
    counts = {what: count for what, count in _divided(model, plan) if deals_experts or what != "experts"}
    if all(count % degree == 0 for count in counts.values()):
        return []
    most = gcd(*counts.values())
    allowed = [str(number) for number in range(1, most + 1) if most % number == 0]
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count % degree)
    return [f"{DEGREE}: {degree} does not divide {found} of {kind}; allowed: {', '.join(allowed)}."]


def _is_known(style: str) -> bool:
    return style in STYLES or style in (SUMMED, EXPERTS, PACKED)


def _is_head(model: Any, name: str) -> bool:
    return model.get_submodule(name) is model.get_output_embeddings()


def _odd_modules(model: Any, plan: Plan) -> Iterator[str]:
    """Modules that the plan splits and that are not built as the styles want them."""
    experts = {name for name, _ in experts_of(model)}
    for name, style in plan.items():
        module = model.get_submodule(name)
        is_among_whole = _is_head(model, name) or (style in STYLES and STYLES[style].is_apart)
        is_fit = isinstance(_base(module), nn.Linear) and _is_plain(module) and not (is_among_whole and is_dora(module))
        if style in STYLES and not is_fit:
            yield f"{name}, a {type(module).__name__}"
        if style == EXPERTS and name not in experts:
            yield f"{name}, a {type(module).__name__}"


def _is_plain(module: Any) -> bool:
    """Whether a linear layer has no adapter, or one that adds the product of two matrices and nothing else, but that
    DoRA then sets lengths."""
    if _base(module) is module:
        return True
    is_lora = set(getattr(module, "lora_A", ())) == {ADAPTER} and (not module.lora_variant or is_dora(module))
    return is_lora and not (module.fan_in_fan_out or module.lora_bias[ADAPTER])


def _divided(model: Any, plan: Plan) -> Iterator[tuple[str, int]]:
    """What is split, and how many there are of it."""
    config = model.config.get_text_config()
    local = {
        name: style for name, style in plan.items() if style in ("colwise", "rowwise") and not _is_head(model, name)
    }
    if any("attn" in name or "attention" in name for name in local):
        yield "attention heads", config.num_attention_heads
        if (heads := getattr(config, "num_key_value_heads", None)) is not None:
            yield "key-value heads", heads
    for name, style in plan.items():
        layer = _base(model.get_submodule(name))
        if style in STYLES and not _is_head(model, name):
            width = layer.in_features if style.startswith("rowwise") else layer.out_features
            yield f"{'inputs' if style.startswith('rowwise') else 'outputs'} of {general(name)}", width
        elif style == EXPERTS:
            yield "experts", layer.num_experts


def _base(module: Any) -> Any:
    """The layer itself, where an adapter stands around it."""
    return getattr(module, "base_layer", module)


def split_tensors(model: Any, tokens: Tokens, *, deals_experts: bool = True) -> frozenset[str]:
    """Split the model over the ranks of a mesh, in place. All ranks must hold the same weights.

    Parts of weights become DTensors under the names they had. deals_experts: experts are dealt out to these ranks, too.
    Gives the names of those that each rank has whole, but whose gradients must be added up over the ranks. What
    `tensor_problems` refuses must not come here.
    """
    plan, mesh, summed = tensor_plan(model), tokens.mesh, set()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and _base(head).weight is table.weight
    is_table_fit = isinstance(table, nn.Embedding) and table.max_norm is None
    is_head_fit = any(_is_head(model, name) and style.startswith("colwise") for name, style in plan.items())
    closed = closed_regions(model, plan)
    for name, style in plan.items():
        module = model.get_submodule(name)
        if module is head and is_tied and not is_table_fit:
            continue
        if module is head:
            _split_head(module, style, mesh)
        elif style in STYLES:
            is_entered = name.rpartition(".")[0] in closed
            for part, kind in _parts(name, module, style):
                split_linear(model, part, STYLES[kind], tokens, enters=not is_entered)
            if is_dora(module):
                split_lengths(module, STYLES[style], mesh)
            if is_entered and hasattr(module, "lora_A") and not STYLES[style].is_by_rows:
                keep_slice(model, f"{name}.lora_A.{ADAPTER}")  # it reads what has entered
                summed.add(f"{name}.lora_A.{ADAPTER}.weight")
        elif style == EXPERTS and deals_experts:
            summed |= deal_out(model, name, mesh, are_tokens_shared=not tokens.are_sliced)
        elif style == SUMMED:
            summed |= {f"{name}.{key}" for key, _ in module.named_parameters()}
    for name in closed:
        on_entry(model.get_submodule(name), lambda hidden, keywords: tokens.enter(hidden, num_tokens(keywords)))
    if is_table_fit and (is_head_fit or not is_tied):
        _split_table(model, table, mesh, _base(head).weight if is_tied else None)
    return frozenset(summed)


def split_dimensions(model: Any, *, deals_experts: bool = True) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights that `split_tensors` splits, and along which dimension; the model may lie on the meta device."""
    plan = tensor_plan(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(_base(head), "weight", None) is getattr(table, "weight", False)
    is_table_fit = isinstance(table, nn.Embedding) and table.max_norm is None
    is_head_fit = any(_is_head(model, name) and style.startswith("colwise") for name, style in plan.items())
    for name, style in plan.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Identity):  # in the place of what another stage has
            continue
        if style in STYLES and not (module is head and is_tied):
            for part_name, kind in _parts(name, module, style):
                part = model.get_submodule(part_name)
                dimension = 1 if kind.startswith("rowwise") else 0
                yield part.weight, dimension
                if not dimension and part.bias is not None:
                    yield part.bias, 0
            if is_dora(module) and not STYLES[style].is_by_rows:
                yield module.lora_magnitude_vector[ADAPTER].weight, 0
        elif style == EXPERTS and deals_experts:
            yield from ((weight, 0) for weight in bare(module).parameters(recurse=False))
    if is_table_fit and (is_head_fit or not is_tied):
        yield table.weight, 0


def split_layers(model: Any) -> Iterator[tuple[str, Style, bool]]:
    """The linear layers below the head that `split_tensors` exchanges: name, how they are split, and whether tokens
    enter split products at each; the model may lie on the meta device."""
    plan = tensor_plan(model)
    closed = closed_regions(model, plan)
    for name, style in plan.items():
        if style not in STYLES or _is_head(model, name):
            continue
        module, is_entered = model.get_submodule(name), name.rpartition(".")[0] in closed
        yield from ((part, STYLES[kind], not is_entered) for part, kind in _parts(name, module, style))
        if is_entered and hasattr(module, "lora_A") and not STYLES[style].is_by_rows:
            yield f"{name}.lora_A.{ADAPTER}", STYLES["colwise"], False


def closed_regions(model: Any, plan: Plan) -> list[str]:
    """The modules (attention, MLPs), by name, all of whose weights the plan splits: what they are given goes into split
    products alone, so that it enters these once for all."""
    parents = {name.rpartition(".")[0] for name, style in plan.items() if style in STYLES and not _is_head(model, name)}
    return [name for name in sorted(parents) if _is_closed(model, name, plan)]


def _is_closed(model: Any, name: str, plan: Plan) -> bool:
    module = model.get_submodule(name)
    parts = [key for key, child in module.named_children() if next(child.parameters(), None) is not None]
    own = next(module.parameters(recurse=False), None)
    return own is None and all(plan.get(f"{name}.{key}") in (*STYLES, SUMMED) for key in parts)


def _split_head(head: Any, style: str, mesh: DeviceMesh) -> None:
    """The head stays a module of its library, since the loss reaches for its weight; by itself it gives all logits."""
    for name, _ in _parts("head", head, style):
        layer = head.get_submodule(name.removeprefix("head").removeprefix("."))
        parallelize_module(layer, mesh, HEAD_STYLES[style](), src_data_rank=None)
        layer.register_forward_hook(_put_together)


def _put_together(layer: nn.Module, given: Any, output: Tensor) -> Tensor:
    """What a layer gives out, whole on each rank where it left it divided."""
    return output.redistribute(placements=[Replicate()]).to_local() if isinstance(output, DTensor) else output


def _parts(name: str, module: Any, style: str) -> Iterator[tuple[str, str]]:
    """The linear layers of a module, by name, and their styles: itself, or the base of an adapter and that half of the
    adapter which is as wide as what is split. The other half is whole on each rank."""
    yield (name if _base(module) is module else f"{name}.base_layer"), style
    if hasattr(module, "lora_A"):
        yield f"{name}.{'lora_A' if style.startswith('rowwise') else 'lora_B'}.{ADAPTER}", style


def _split_table(model: Any, table: nn.Embedding, mesh: DeviceMesh, of_head: nn.Parameter | None) -> None:
    """Split a table of embeddings by tokens, in place; or share the weight that the head was given, to which it is
    tied."""
    weight = of_head
    if weight is None:
        split = distribute_tensor(table.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        weight = nn.Parameter(split, requires_grad=table.weight.requires_grad)
    table.register_parameter("weight", weight)
    exchange(model, next(name for name, module in model.named_modules() if module is table), table, _lookup)


def _lookup(own: Any) -> Forward:
    """Each rank looks up the tokens whose rows it has, whatever the library's class makes of a row; the sum is all."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        rows = Rows.of(self.weight)
        padding = self.padding_idx
        is_here = padding is not None and rows.start <= padding < rows.end
        part = locally(own, self, padding_idx=padding - rows.start if is_here else None)
        found = own.forward(part, rows.local(ids))
        return leaving(found.masked_fill(~rows.here(ids)[..., None], 0), rows.mesh)

    return forward

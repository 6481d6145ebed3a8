"""From a recipe to a model that lies divided over processes, whole in none of them where its files allow that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training_hub.algorithms import find_algorithm
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.adaptations.protocol import Adaptation
from training_hub.backends.torch_engine.attention import FUNCTIONS, register_attention, varlen_problem
from training_hub.backends.torch_engine.fused.functions import TYPES, problem_on
from training_hub.backends.torch_engine.fused.swap import stay_on_kernels, swap
from training_hub.backends.torch_engine.layouts import Layout
from training_hub.backends.torch_engine.layouts.fully_sharded import slices_bytes
from training_hub.backends.torch_engine.layouts.pieces import local_of
from training_hub.backends.torch_engine.loading.blank import (
    empty_again,
    fill,
    loading_report,
    lost_buffers,
    plain_name,
    see_one_number,
    without_contents,
)
from training_hub.backends.torch_engine.loading.low_bits import empty_layers, fill_layers, whole_reason
from training_hub.backends.torch_engine.loading.model import (
    LoadedModel,
    attach_attention,
    attention_names,
    attention_notes,
    load_model,
    model_notes,
    named,
    unexpected_notes,
)
from training_hub.backends.torch_engine.loading.model_config import local_copy, read_config, take_generation_config
from training_hub.backends.torch_engine.loading.on_demand import OnDemand, hand_out
from training_hub.backends.torch_engine.loading.quantization import NONE, part
from training_hub.backends.torch_engine.loading.rounding import round_in_forward, unrounded
from training_hub.backends.torch_engine.parallel import ALONE, Group
from training_hub.backends.torch_engine.saving.base_weights import BaseWeights, base_of
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.errors import BackendError, RecipeError, TrainingError
from training_hub.recipe import Recipe
from training_hub.types import Console


def load_for(
    layout: Layout,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    model: Any,
    lengths: Sequence[int],
    console: Console,
) -> LoadedModel:
    """The recipe's model, or the live `model` given instead; without contents where it is to be divided and its files
    can be read in pieces. Raises RecipeError where a live model was to be divided."""
    if not layout.is_divided:
        return load_model(recipe, device, dtype, model, lengths)
    _refuse_slices_of_bytes(layout, recipe)
    if model is not None:
        raise RecipeError(
            "parallelism.data_parallel_shard_degree: a model that was handed over is whole in each process. Give its "
            "folder as model.path, or write 1."
        )
    whole = ADAPTATIONS[find_algorithm(recipe.algorithm).adaptation](recipe).begins_beside()
    blank: LoadedModel | str = whole or load_blank(recipe, device, dtype)
    if isinstance(blank, LoadedModel):
        return blank
    console.say(f"model: each process reads all of it before it is divided, since {blank}")
    return load_model(recipe, device, dtype, None, lengths)


def _refuse_slices_of_bytes(layout: Layout, recipe: Recipe) -> None:
    kept = recipe.model.quantization
    if kept == NONE or not layout.is_sharded or layout.mesh is None or slices_bytes(layout.mesh):
        return
    raise RecipeError(
        f"parallelism.data_parallel_shard_degree: torch {torch.__version__} makes no slices of {kept} weights, which "
        "are bytes. Write 1, or model.quantization: none, or install a newer one: pip install -U torch."
    )


def load_blank(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> LoadedModel | str:
    """The recipe's model without contents, on our kernels; or why it must be read whole. Raises BackendError where the
    attention that is asked for is not possible."""
    import transformers

    register_attention()
    chosen, problem = recipe.model, varlen_problem(device, dtype)
    if chosen.attention == "varlen" and problem:
        raise BackendError(problem)
    place = local_copy(chosen)
    config, original = read_config(place)
    options = {"dtype": dtype, "trust_remote_code": chosen.trust_remote_code}
    model = without_contents(lambda: transformers.AutoModelForCausalLM.from_config(config, **options))
    take_generation_config(model, place)
    base = base_of(place, model)
    with opened(base.files) as tensors:
        info = loading_report(model, base.named(tensors))
        found = tensors.shapes
    lost = [name for name in lost_buffers(model) if name not in found]
    if lost:
        return f"its buffers {named(lost)} are not computed anew"
    if info["missing_keys"] or info["mismatched_keys"]:
        return "its files hold weights otherwise than it does"
    if chosen.quantization != NONE:
        if reason := whole_reason(model, chosen.quantization):
            return reason
        empty_layers(model, chosen.quantization)
    if dtype in TYPES and problem_on(device) is None and not recipe.training.compile:
        swap(model)
    told = [*unexpected_notes(info["unexpected_keys"]), *filter(None, [round_in_forward(model, recipe.qat)])]
    return LoadedModel(model, original, "", tuple(told), base.files, base)


def attach(loaded: LoadedModel, adaptation: Adaptation, device: torch.device, group: Group = ALONE) -> LoadedModel:
    """The model with what trains, in place. One without contents gets only what the adaptation puts beside its weights,
    with the numbers that it has beside whole ones: those that it looks at are read one by one, each by one process of
    the group for all, which must all call it."""
    model = loaded.model
    if not loaded.files:
        adaptation.attach(model)
        return loaded
    see_one_number(model, device)  # in which it is made as beside any weights
    with loaded.base.opened() as came:
        shown = OnDemand(model, came, group)
        with shown:
            adaptation.attach(model)
    empty_again(model, loaded.base.shapes, device)
    shown.share(model)
    adaptation.shared()
    if not shown.looked:
        return loaded
    told = f"what trains is made of {shown.looked} weights, read one by one; {shown.numbers_read:,} numbers here"
    return replace(loaded, notes=(*loaded.notes, told), changed=shown.changed)


def divide(
    layout: Layout,
    loaded: LoadedModel,
    adaptation: Adaptation,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int],
    console: Console,
) -> tuple[LoadedModel, Layout]:
    """The model, in place, divided over the processes, all of which must call it; one without contents gets its
    weights, and is then looked at as `load_model` does. And the layout, which knows more now.

    Raises TrainingError for weights that are not finite, RecipeError where the model cannot be divided so."""
    model = loaded.model
    if not loaded.files:
        if layout.is_sharded or layout.degrees.tp > 1:
            part(model)
        # What was drawn at random, or found by another library, before each keeps a piece of it.
        layout.group.spread(model.state_dict().values())
        if layout.degrees.pp == 1:  # else each has found what belongs to its own stages
            layout.group.spread([*adaptation.weights().values(), *adaptation.saved().values()])
        layout = layout.divide(model, dtype, adaptation.undivided)
        _begin_exactly(model, loaded.base, dtype)
        adaptation.divided()
        layout.spread(model)
        return loaded, layout
    wanted = loaded.base.shapes
    numbers = sum(math.prod(wanted[plain_name(name)]) for name, one in model.named_parameters() if one.is_meta)
    layout = layout.divide(model, dtype, adaptation.undivided)
    is_offloaded = recipe.parallelism.enable_cpu_offload
    loaded, broken = filled(loaded, numbers, device, console, is_offloaded=is_offloaded)
    refuse_broken_model(recipe, [line for some in layout.group.gather(broken) for line in some])
    adaptation.filled()
    hand_out(model, loaded.changed, layout.group)
    layout.let_go(model)
    loaded = looked_at(loaded, recipe.model.attention, lengths, device, dtype)
    adaptation.divided()
    layout.spread(model)
    return loaded, layout


def filled(
    loaded: LoadedModel,
    numbers: int,
    device: torch.device,
    console: Console,
    *,
    is_offloaded: bool,
) -> tuple[LoadedModel, list[str]]:
    """The model, divided and without contents, with this process's pieces of its weights, read from its files; and
    which of them, or of what it read for others, are not finite. All among which a quantised layer lies must call it.

    numbers: how many its weights have."""
    waiting = sum(one.is_meta for one in loaded.model.parameters())
    with opened(loaded.files) as files, console.progress("reading weights", waiting, "weights") as advance:
        by_name = loaded.base.named(files)
        fill(loaded.model, by_name, device, is_offloaded, advance)
        broken = fill_layers(loaded.model, by_name, device, advance)
        share = f"each process reads its own slices of the weights; here {files.numbers_read / numbers:.1%}"
    return replace(loaded, notes=(*loaded.notes, share), files=()), [*broken, *broken_pieces(loaded.model)]


def broken_pieces(model: nn.Module) -> list[str]:
    """What this process has of a divided model that is not finite."""
    return nonfinite_tensors({name: local_of(weight) for name, weight in model.named_parameters()})


def looked_at(
    loaded: LoadedModel,
    requested: str,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None = None,
) -> LoadedModel:
    """The divided model with the attention and the kernels under which it says what it says by itself, in evaluation
    mode; all processes of the group, or all there are, must call it."""
    model = loaded.model.eval()
    names, tried = attention_names(requested, model, lengths, device, dtype)
    names = _agreed(names, group)
    with unrounded(model):  # where rounding would make much of little differences
        attention = attach_attention(model, names, dtype)
        kernels = stay_on_kernels(model, dtype)
    notes = [*loaded.notes, *tried, *attention_notes(attention, names), *model_notes(model)]
    notes += [kernels] if kernels else []
    return replace(loaded, attention=attention, notes=tuple(notes))


def _agreed(names: list[str], group: dist.ProcessGroup | None) -> list[str]:
    """The attentions to try, in the order of the group's first process: each has timed them, and passes of a divided
    model are made together."""
    known = list(FUNCTIONS)
    places = torch.full((len(known),), -1)
    places[: len(names)] = torch.tensor([known.index(name) for name in names])
    dist.broadcast(places, group=group, group_src=0)
    return [known[place] for place in places.tolist() if place >= 0]


@torch.no_grad()
def _begin_exactly(model: nn.Module, base: BaseWeights, dtype: torch.dtype) -> None:
    """Give what trains, and has become wider than `dtype` by being divided, the numbers that it came with."""
    with base.opened() as came:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype != dtype:
                exact = came.finer(name, parameter, dtype)
                if exact is not None:
                    local_of(parameter).copy_(exact)


def refuse_broken_model(recipe: Recipe, problems: Sequence[str]) -> None:
    """Raise TrainingError where the model came with numbers that are not finite."""
    if problems:
        raise TrainingError([*problems, f"{recipe.model.path} came with them. Download or convert it again."])

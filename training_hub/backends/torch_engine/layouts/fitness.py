"""Which ways of splitting a recipe and its model allow: asked before a weight is read, and again before it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from training_hub.backends.shared.model_folder import folder_problems, is_folder
from training_hub.backends.torch_engine.layouts.abilities import can_split_backward
from training_hub.backends.torch_engine.layouts.context import context_problems
from training_hub.backends.torch_engine.layouts.cut import answer_problems, pipeline_problems
from training_hub.backends.torch_engine.layouts.experts import expert_problems
from training_hub.backends.torch_engine.layouts.sequence import slice_problems
from training_hub.backends.torch_engine.layouts.stages import ORDERS, SCHEDULE
from training_hub.backends.torch_engine.layouts.tensor import general, split_layers, tensor_problems
from training_hub.backends.torch_engine.loading.model_config import read_blank_model, read_config
from training_hub.backends.torch_engine.loading.quantization import METHODS, NONE, PACKED
from training_hub.recipe import Recipe
from training_hub.recipe.adapter_folder import said_in
from training_hub.recipe.parallelism import Degrees, Parallelism

TENSOR = "parallelism.tensor_parallel_degree"

A_MATRIX = (4096, 4096)
"""The shape of a weight as blocks have them."""

SPLIT_TUNERS = ("lora", "rslora", "dora")
"""Adapters whose halves are split as the weights beside them are, and lengths with them."""


def split_problems(model: Any, degrees: Degrees, asked: Parallelism) -> list[str]:
    """Why the model, which may lie on the meta device, cannot be split by these degrees; [] where it can. asked: how
    stages are to be made, and how tokens lie between layers that are split."""
    of_heads = tensor_problems(model, degrees.tp, deals_experts=degrees.ep == 1) if degrees.tp > 1 else []
    is_sliced = degrees.tp > 1 and asked.sequence_parallel and not of_heads
    packings = (getattr(module, PACKED) for module in model.modules() if hasattr(module, PACKED))
    block = max((packing.block for packing in packings), default=1)
    return [
        *(pipeline_problems(model, asked) if degrees.pp > 1 else []),
        *of_heads,
        *(_block_problems(model, degrees.tp, block) if degrees.tp > 1 and not of_heads else []),
        *(slice_problems(model) if is_sliced else []),
        *(context_problems(model, degrees.cp) if degrees.cp > 1 else []),
        *(expert_problems(model, degrees.ep) if degrees.ep > 1 else []),
    ]


def way_problems(recipe: Recipe, degrees: Degrees) -> list[str]:
    """Why this recipe cannot be run with models, packs or experts split so; no weight is read."""
    found = _settings_problems(recipe, degrees)
    chosen = recipe.model
    is_readable = is_folder(chosen.path) and not folder_problems(
        chosen.path, trust_remote_code=chosen.trust_remote_code, with_weights=False
    )
    if is_readable and not found and degrees.dp_shard > 1:
        found = _row_problems(recipe)
    if found or not is_readable or (degrees.sharers == 1 and degrees.ep == 1):
        return found
    model = read_blank_model(chosen)[0]
    answers = degrees.pp > 1 and recipe.evaluation.generate
    found = split_problems(model, degrees, recipe.parallelism)
    if degrees.tp > 1 and chosen.quantization != NONE and not found:
        found = _block_problems(model, degrees.tp, METHODS[chosen.quantization].block)
    if degrees.tp > 1 and recipe.qat.weight_dtype is not None and not found:
        found = _group_problems(model, degrees.tp, recipe.qat.group_size)
    return [*found, *(answer_problems(model) if answers else [])]


def _row_problems(recipe: Recipe) -> list[str]:
    """Why rows of a table do not train beside slices of it, as far as the model's config tells."""
    folder, where = recipe.lora.adapter, "lora.trainable_tokens"
    has_any: Any = recipe.lora.trainable_tokens
    if folder is not None:
        where = "lora.adapter: it has rows of a table (lora.trainable_tokens)"
        has_any = said_in(Path(folder).expanduser()).get("trainable_token_indices")
    if recipe.algorithm != "lora_sft" or not has_any:
        return []
    if not read_config(recipe.model, with_weights=False)[0].get_text_config().tie_word_embeddings:
        return []
    return [
        f"{where}: the table is also the head, which would put rows that lie in slices among whole ones. Write "
        "parallelism.data_parallel_shard_degree: 1, or use an adapter without trainable_tokens."
    ]


def _group_problems(model: Any, among: int, size: int) -> list[str]:
    """Why weights of a model without contents that share a scale would lie in several of `among` processes."""
    layers = [(name, model.get_submodule(name).in_features, style) for name, style, _ in split_layers(model)]
    widths = {general(name): width // (among if style.is_by_rows else 1) for name, width, style in layers}
    odd = next((name for name, width in widths.items() if width % size), None)
    if odd is None:
        return []
    fitting = next(n for n in range(size, 0, -1) if not any(width % n for width in widths.values()))
    write = f"Write {fitting}, or {TENSOR}: 1" if fitting > 1 else f"Write {TENSOR}: 1"
    return [
        f"qat.group_size: {size} does not divide the {widths[odd]} inputs of {odd} that a process has where heads and "
        f"widths are split among {among}. {write}."
    ]


def _block_problems(model: Any, among: int, block: int) -> list[str]:
    """Why weights that share a scale, as `block` of them do one behind the other, would lie in several of `among`
    processes; of a model that is quantised already, or without contents and is to be."""
    layers = [(name, model.get_submodule(name), style.is_by_rows) for name, style, _ in split_layers(model)]
    packed = [one for one in layers if hasattr(one[1], PACKED)] or layers
    # How many weights, one behind the other, go to a process at a time: of its columns a row, of its rows all.
    runs = {
        general(name): (layer.in_features, 1) if is_by_rows else (layer.out_features, layer.in_features)
        for name, layer, is_by_rows in packed
    }

    def odd(number: int) -> list[str]:
        return [name for name, (count, each) in runs.items() if number > 1 and count // number * each % block]

    if not odd(among):
        return []
    name = odd(among)[0]
    count, each = runs[name]
    fitting = [str(number) for number in range(1, among) if not (among % number or odd(number))]
    return [
        f"{TENSOR}: {among} cuts the {count} {'inputs' if each == 1 else 'outputs'} of {name} into parts of "
        f"{count // among}, and model.quantization: int4 keeps a scale for each {block} weights of a row. Write "
        f"{' or '.join(fitting)}, or model.quantization: int8, or none."
    ]


def _settings_problems(recipe: Recipe, degrees: Degrees) -> list[str]:
    is_adapted, folder, tuner = recipe.algorithm == "lora_sft", recipe.lora.adapter, recipe.lora.tuner
    remedy = "Write 1, or lora.tuner: lora"
    if folder is not None:
        tuner = str(said_in(Path(folder).expanduser()).get("peft_type", tuner)).lower()
        remedy = "Write 1, or go on with an adapter of LoRA"
    found = [f"{TENSOR}: an adapter of {tuner} cannot be split. {remedy}."]
    is_whole = degrees.tp == 1 or not is_adapted or tuner in SPLIT_TUNERS
    return [*([] if is_whole else found), *_pipeline_problems(recipe, degrees)]


def _pipeline_problems(recipe: Recipe, degrees: Degrees) -> list[str]:
    if degrees.pp == 1:
        return []
    asked = recipe.parallelism
    splits = ORDERS[asked.pipeline_parallel_schedule].splits
    refused = {
        f"{SCHEDULE}: {asked.pipeline_parallel_schedule} makes gradients of weights by itself, which torch "
        f"{torch.__version__} does wrongly. Write {SCHEDULE}: 1F1B or Interleaved1F1B, or install a newer one: "
        "pip install -U torch.": splits and not can_split_backward(),
        f"{SCHEDULE}: {asked.pipeline_parallel_schedule} goes through a layer twice in backward, and what "
        "training.activation_checkpointing: selective keeps serves once. Write full or none, or "
        f"{SCHEDULE}: 1F1B.": splits and recipe.training.activation_checkpointing == "selective",
        f"{SCHEDULE}: {asked.pipeline_parallel_schedule} makes gradients of weights in their own format, and "
        f"optimizer.state: {recipe.optimizer.state} wants them in float32. Write {SCHEDULE}: 1F1B or Interleaved1F1B, "
        "or optimizer.state: full.": splits and recipe.optimizer.state != "full",
    }
    return [problem for problem, is_so in refused.items() if is_so]

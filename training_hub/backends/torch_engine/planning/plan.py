"""The plan of a run: what will be done and what it takes.

A run writes it as plan.json; `plan` makes the same one without weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from training_hub.algorithms import find_algorithm
from training_hub.backends import Given
from training_hub.backends.shared.packs import planned, settings_of
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.adaptations.holdings import NOTHING, Holdings
from training_hub.backends.torch_engine.checkpointing import HOW, NONE, SELECTIVE, USABLE, free_gib, num_layers
from training_hub.backends.torch_engine.freezing import Thaw, turns_of
from training_hub.backends.torch_engine.layouts.cut import fullest, planned_stages
from training_hub.backends.torch_engine.layouts.shapes import layers_at
from training_hub.backends.torch_engine.layouts.share import EVERYTHING, Share, Sizes, cut_down, exchanged_bytes
from training_hub.backends.torch_engine.layouts.stages import ORDERS, late, under_way, waiting
from training_hub.backends.torch_engine.loading.model import choose_device, choose_dtype
from training_hub.backends.torch_engine.loading.model_config import read_blank_model
from training_hub.backends.torch_engine.loading.quantization import nums_of, quantiser
from training_hub.backends.torch_engine.materials import Materials, load_materials
from training_hub.backends.torch_engine.planning.memory import (
    MOST_SIZES,
    SIZES_OF_PACKS,
    Estimate,
    Stage,
    blank_like,
    estimate,
)
from training_hub.backends.torch_engine.planning.work import measured_peak, work_of
from training_hub.backends.torch_engine.teacher.load import TeacherLoad, teacher_load
from training_hub.data.feed import Feed, FeedSettings
from training_hub.data.forecast import forecast, num_pack_sizes
from training_hub.recipe import Recipe
from training_hub.recipe.parallelism import Parallelism
from training_hub.types import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens per pack that keep the matrix units busy; more only costs memory. The recipe's max_tokens_per_gpu is a bound.
PREFERRED_TOKENS = {"cpu": 8192, "cuda": 32768}


def plan(recipe: Recipe, console: Console, *, measures: bool) -> dict[str, Any]:
    """The plan of a run of `recipe` on this machine, from the data, the tokenizer and the model's config.

    measures: time a matrix product and say how long the run's own products take at that rate, as `time`.
    """
    device = choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    blank, save_dtype = read_blank_model(recipe.model, recipe.qat)
    materials = load_materials(recipe, Given(), console)
    adaptation = ADAPTATIONS[find_algorithm(recipe.algorithm).adaptation](recipe)
    model = adaptation.attach(blank)
    store = materials.prepared.train
    feed = Feed(store, feed_settings(recipe, int(store.lengths.max()), device, recipe.data.packing))
    procs = recipe.processes.procs
    local = procs if isinstance(procs, int) else max(1, torch.cuda.device_count())
    world_size = local * recipe.processes.nodes
    found = describe(recipe, materials, model, feed, device, dtype, save_dtype, adaptation.holdings(), world_size)
    if measures:
        beside = load_beside(recipe, materials, feed, device)
        asked = beside.operations_of(store, found["run"]) if beside is not None else 0.0
        found["time"] = time_of_products(model, found["run"], device, dtype, asked)
    return found


def load_beside(
    recipe: Recipe, materials: Materials, feed: Feed, device: torch.device, share: Share = EVERYTHING
) -> TeacherLoad | None:
    """What a teacher costs the run, None where there is none. share: what the first process has of the student."""
    facts = materials.teacher
    return None if facts is None else teacher_load(recipe, facts, feed.largest_pack(), device, share)


def feed_settings(recipe: Recipe, longest: int, device: torch.device, is_packed: bool) -> FeedSettings:
    """How the recipe's rows become batches on this device."""
    return settings_of(recipe, longest, PREFERRED_TOKENS[device.type], is_packed)


def describe(
    recipe: Recipe,
    materials: Materials,
    model: PreTrainedModel,
    feed: Feed,
    device: torch.device,
    dtype: torch.dtype,
    save_dtype: torch.dtype,
    holdings: Holdings = NOTHING,
    world_size: int = 1,
) -> dict[str, Any]:
    """The plan as plain JSON. `model` may lie on the meta device: only its shapes count.

    Of several processes each holds what `memory_gib` says; samples, tokens and packs are those of all.
    """
    moved = [p for name, p in model.named_parameters() if p.requires_grad and name not in holdings.claimed]
    trained = sum(p.numel() for p in moved) + holdings.trained
    told = planned(recipe, materials.prepared, materials.template, feed)
    in_stages = recipe.parallelism.pipeline_parallel_degree > 1
    local = blank_like(fullest(model, recipe.parallelism) if in_stages else model)
    share = Share.of(recipe.parallelism, world_size)
    beside = load_beside(recipe, materials, feed, device, share)
    sizes = Sizes.of(local, cut_down(local, share))
    is_whole = share.slices == share.heads == 1 and not in_stages
    moving = replace(sizes, trained=trained) if is_whole else sizes  # between replicas only what moves passes
    packs_of_one = told["run"]["packs_per_step"] / share.of_data
    makes_later = in_stages and ORDERS[recipe.parallelism.pipeline_parallel_schedule].splits
    sent = exchanged_bytes(moving, share, dtype, packs_of_one, makes_later=makes_later)
    sent += _passed_bytes(recipe, model, feed, dtype, packs_of_one) / (share.heads * share.tokens)
    sent += beside.sent * packs_of_one if beside is not None else 0
    checkpointing, memory = memory_of(recipe, model, feed, device, dtype, holdings, free_gib(device), beside, share)
    return {
        "algorithm": recipe.algorithm,
        "engine": "torch",
        "device": device.type,
        "processes": world_size,
        "slices": share.slices,
        "split_among": {"heads": share.heads, "tokens": share.tokens, "experts": share.experts},
        **_stages(recipe, model, packs_of_one),
        "exchanged_gib_per_step": sent / 2**30,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": {"name": recipe.model.quantization, **quantiser(recipe.model.quantization)},
        "save_dtype": str(save_dtype).removeprefix("torch."),
        "parameters": sum(nums_of(model).values()),
        "trained_parameters": trained,
        "frozen_at_first": Thaw(model, turns_of(model, recipe.freezing)).frozen_at_first(),
        **told,
        "activation_checkpointing": checkpointing,
        "memory_gib": memory,
        **({"teacher": _teacher(recipe, materials)} if materials.teacher else {}),
    }


def _passed_bytes(recipe: Recipe, model: PreTrainedModel, feed: Feed, dtype: torch.dtype, packs: float) -> float:
    """What is sent from stage to stage in a step, forward and back, by those with one place in a pipeline."""
    asked = recipe.parallelism
    if asked.pipeline_parallel_degree == 1:
        return 0.0
    stages, width = planned_stages(model, asked), model.config.get_text_config().hidden_size
    each = len(stages.ends) / asked.pipeline_parallel_degree
    return 2 * each * packs * feed.settings.token_budget * width * dtype.itemsize


def _stages(recipe: Recipe, model: PreTrainedModel, packs: float) -> dict[str, Any]:
    """Of a pipeline: how many layers each stage has, in what order they work, and the share of time that one waits."""
    asked = recipe.parallelism
    if asked.pipeline_parallel_degree == 1:
        return {}
    stages = planned_stages(model, asked)
    return {
        "pipeline": {
            "processes": asked.pipeline_parallel_degree,
            "schedule": asked.pipeline_parallel_schedule,
            "layers": [len(stages.layers(stage)) for stage in range(len(stages.ends))],
            "packs": packs,
            "waiting": waiting(asked, packs),
        }
    }


def _teacher(recipe: Recipe, materials: Materials) -> dict[str, Any]:
    asked, facts = recipe.distillation, materials.teacher
    assert facts is not None
    return {
        "path": facts.chosen.path,
        "divergence": asked.divergence,
        "cache": asked.cache,
        "common_tokens": facts.common,
        "fingerprint": facts.fingerprint,
    }


def memory_of(
    recipe: Recipe,
    model: PreTrainedModel,
    feed: Feed,
    device: torch.device,
    dtype: torch.dtype,
    holdings: Holdings,
    free: float | None,
    teacher: TeacherLoad | None = None,
    share: Share = EVERYTHING,
) -> tuple[str, Estimate]:
    """How activations are checkpointed, and the memory that a step then takes.

    auto is the first way whose estimate fits into `free` GiB of the device, else the one that takes least.
    """
    packs, sizes = forecast(feed)["packs_per_step"], num_pack_sizes(feed, MOST_SIZES // SIZES_OF_PACKS)
    asked, wanted, is_read_whole = recipe.parallelism, recipe.training.activation_checkpointing, _is_read_whole(recipe)
    parts = list(stages_of(model, asked, max(1.0, packs / share.of_data)))
    possible = [how for how in HOW if how != SELECTIVE or not ORDERS[asked.pipeline_parallel_schedule].splits]
    keeps = packs > share.of_data or recipe.training.cuda_graphs
    forgets = num_layers(model) and not (recipe.training.compile or recipe.training.cuda_graphs)
    ways = (wanted,) if wanted != "auto" else possible if forgets else (NONE,)
    for how in ways:
        each = [
            estimate(
                here, recipe.optimizer, dtype, device, feed.largest_pack(),
                accumulates=keeps, holdings=_held_here(holdings, here, model), checkpointing=how,
                teacher=teacher if stage.is_last else None, share=share,
                stage=stage,
                is_compiled=recipe.training.compile,
                is_staged=recipe.checkpoint.async_mode != "disabled",
                is_read_whole=is_read_whole,
                among=0 if is_read_whole else _sharing(asked, share),
                num_pack_sizes=sizes,
            )
            for here, stage in parts
        ]  # fmt: skip
        memory = max(each, key=lambda one: one["total"])
        if free is None or memory["activations"] is None or memory["total"] <= USABLE * free:
            break
    return how, memory


def _is_read_whole(recipe: Recipe) -> bool:
    """Whether each process holds all of the model before it is divided."""
    return bool(ADAPTATIONS[find_algorithm(recipe.algorithm).adaptation](recipe).begins_beside())


def _sharing(asked: Parallelism, share: Share) -> int:
    """Over how many processes a model is divided, replicas among them; 0 where each has all of it."""
    parts = share.heads * share.tokens * asked.pipeline_parallel_degree
    return parts * share.of_data if parts * share.slices * share.experts > 1 else 0


def _held_here(holdings: Holdings, here: PreTrainedModel, model: PreTrainedModel) -> Holdings:
    """What is held beside the layers of `here`, of those of the model."""
    return holdings if here is model else holdings.of_share(num_layers(here) / num_layers(model))


def stages_of(model: PreTrainedModel, asked: Parallelism, packs: float) -> Iterator[tuple[PreTrainedModel, Stage]]:
    """What processes of a pipeline have of the model and do, those that may have most: at its ends, and beside the
    first; of a model that is not in stages, the model."""
    degree = asked.pipeline_parallel_degree
    if degree == 1:
        yield model, Stage()
        return
    stages = planned_stages(model, asked)
    for place in sorted({0, 1, degree - 1}):
        at_once, own = under_way(asked, stages, place, packs), len(stages.of_process(place))
        ends = (place == stages.owners[0], place == stages.owners[-1])
        yield layers_at(model, asked, place), Stage(own, at_once, packs, *ends, late(asked, stages, place, packs))


def summary(plan: dict[str, Any]) -> str:
    """The plan in one line."""
    how = plan["activation_checkpointing"]
    share = plan["trained_tokens"] / max(1, plan["tokens"])
    return (
        f"plan: {plan['total_steps']:,} steps over {plan['samples']:,} samples, {plan['tokens']:,} tokens "
        f"({share:.0%} trained); {plan['trained_parameters']:,} of {plan['parameters']:,} parameters, "
        f"{plan['dtype']} on {plan['device']}, packs of {plan['tokens_per_pack']:,} tokens"
        + ("" if plan["processes"] == 1 else f", in {plan['processes']} processes")
        + _pipeline_words(plan)
        + ("" if how == NONE else f", {how} activation checkpointing")
        + (f"; {plan['teacher']['divergence']} from {plan['teacher']['path']}" if "teacher" in plan else "")
    )


def _pipeline_words(plan: dict[str, Any]) -> str:
    stages = plan.get("pipeline")
    if stages is None:
        return ""
    return f", stages of {', '.join(map(str, stages['layers']))} layers ({stages['schedule']})"


def time_of_products(
    model: PreTrainedModel,
    run: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    beside: float = 0.0,
) -> dict[str, Any]:
    """Seconds that the run's products of weights take at the rate of one measured product: a bound from below.

    Attention, and all that is not a product, come on top; so do the steps of the optimizer. beside: operations of
    another model's products.
    """
    work, rate = work_of(model), measured_peak(device, dtype)
    operations = work.per_token * run["tokens"] + work.per_trained_token * run["trained_tokens"] + beside
    return {
        "at_least_seconds": operations / rate,
        "basis": f"a matrix product in {str(dtype).removeprefix('torch.')} measured now on {device.type}: "
        f"{rate / 1e12:.3g} TFLOP/s",
    }

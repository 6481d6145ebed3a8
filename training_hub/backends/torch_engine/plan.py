"""The plan of a run: what will be done and what it takes.

A run writes it as plan.json; `plan` makes the same one without weights.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from training_hub.algorithms import find_algorithm
from training_hub.backends import Given
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.materials import Materials, load_materials
from training_hub.backends.torch_engine.memory import estimate
from training_hub.backends.torch_engine.model import choose_device, choose_dtype, read_blank_model
from training_hub.data.feed import Feed, FeedSettings
from training_hub.data.forecast import forecast, length_quantiles
from training_hub.recipe import Recipe
from training_hub.types import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens per pack that keep the matrix units busy; more only costs memory. The recipe's max_tokens_per_gpu is a bound.
PREFERRED_TOKENS = {"cpu": 8192, "cuda": 32768}
# Rows and columns of the matrices whose product is timed: enough to keep the device busy for a moment.
MEASURED_SIZE = {"cpu": 1536, "cuda": 8192}
MEASUREMENTS = 5


def plan(recipe: Recipe, console: Console, *, measures: bool) -> dict[str, Any]:
    """The plan of a run of `recipe` on this machine, from the data, the tokenizer and the model's config.

    measures: time a matrix product and say how long the run's own products take at that rate, as `time`.
    """
    device = choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    blank, save_dtype = read_blank_model(recipe.model)
    materials = load_materials(recipe, Given(), console)
    model = ADAPTATIONS[find_algorithm(recipe.algorithm).adaptation](recipe).attach(blank)
    store = materials.prepared.train
    feed = Feed(store, feed_settings(recipe, int(store.lengths.max()), device, recipe.data.packing))
    found = describe(recipe, materials, model, feed, device, dtype, save_dtype)
    if measures:
        found["time"] = time_of_products(model, found["run"], device, dtype)
    return found


def feed_settings(recipe: Recipe, longest: int, device: torch.device, is_packed: bool) -> FeedSettings:
    """How the recipe's rows become batches on this device."""
    preferred = PREFERRED_TOKENS[device.type]
    bound = recipe.training.max_tokens_per_gpu or max(preferred, recipe.training.max_seq_len)
    return FeedSettings(
        samples_per_step=recipe.training.global_batch_size,
        token_budget=max(longest, min(bound, preferred)),
        seed=recipe.seed,
        epochs=recipe.training.epochs,
        steps=recipe.training.steps,
        is_shuffled=recipe.data.shuffle,
        is_packed=is_packed,
    )


def describe(
    recipe: Recipe,
    materials: Materials,
    model: PreTrainedModel,
    feed: Feed,
    device: torch.device,
    dtype: torch.dtype,
    save_dtype: torch.dtype,
) -> dict[str, Any]:
    """The plan as plain JSON. `model` may lie on the meta device: only its shapes count."""
    store, validation = materials.prepared.train, materials.prepared.validation
    parameters = list(model.parameters())
    return {
        "algorithm": recipe.algorithm,
        "engine": "torch",
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "save_dtype": str(save_dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "samples": len(store),
        "tokens": int(store.lengths.sum()),
        "trained_tokens": int(store.trained_tokens.sum()),
        "longest_sample": int(store.lengths.max()),
        "lengths": {**length_quantiles(store), "max_seq_len": recipe.training.max_seq_len},
        "validation_samples": len(validation) if validation is not None else 0,
        "samples_per_epoch": feed.samples_per_epoch,
        "steps_per_epoch": feed.steps_per_epoch,
        "total_steps": feed.total_steps,
        "tokens_per_pack": feed.settings.token_budget,
        "packed": feed.settings.is_packed,
        "run": forecast(feed),
        "memory_gib": estimate(model, recipe.optimizer, dtype, device, feed.largest_pack()),
        "chat_template": materials.template.name if materials.template else None,
        "data": materials.prepared.report,
    }


def summary(plan: dict[str, Any]) -> str:
    """The plan in one line."""
    share = plan["trained_tokens"] / max(1, plan["tokens"])
    return (
        f"plan: {plan['total_steps']:,} steps over {plan['samples']:,} samples, {plan['tokens']:,} tokens "
        f"({share:.0%} trained); {plan['trained_parameters']:,} of {plan['parameters']:,} parameters, "
        f"{plan['dtype']} on {plan['device']}, packs of {plan['tokens_per_pack']:,} tokens"
    )


def time_of_products(
    model: PreTrainedModel, run: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Seconds that the run's products of weights take at the rate of one measured product: a bound from below.

    Each number in a matrix costs 6 operations per token (2 forward, 4 backward), in the head only per trained token.
    Attention, and all that is not a product, come on top; so do the steps of the optimizer.
    """
    rate = measured_rate(device, dtype)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    apart = {id(layer.weight) for layer in (head, table) if layer is not None}
    body = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in apart)
    in_head = head.weight.numel() if head is not None else 0
    operations = 6 * (body * run["tokens"] + in_head * run["trained_tokens"])
    return {
        "at_least_seconds": operations / rate,
        "basis": f"a matrix product in {str(dtype).removeprefix('torch.')} measured now on {device.type}: "
        f"{rate / 1e12:.3g} TFLOP/s",
    }


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product: the best of a few, the first left out."""
    size = MEASURED_SIZE[device.type]
    # Random numbers: a GPU draws less power on zeros, and is faster than it will be.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + MEASUREMENTS):
        _wait(device)
        began = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

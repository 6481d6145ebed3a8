"""What the jax engine does not do, said before anything is loaded; and whether JAX is there at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from training_hub.algorithms import find_algorithm
from training_hub.backends.jax_engine import lora, osft
from training_hub.recipe import Recipe
from training_hub.recipe.findings import value_at

PACKAGES = ("jax", "jaxlib", "optax")

MISSING = "backend: jax needs {names}, not installed here: pip install 'training-hub[jax]', or write backend: torch."

DIVIDING = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
)
"""Settings of parallelism that this engine honours, by the devices of all its processes."""

OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "SGD", "Adagrad", "RMSprop", "Adafactor", "Lion", "Muon")
"""Update rules that are torch's own here, step for step; a test compares each."""

ADAPTATIONS = ("full", "lora", "osft")
"""Adaptations of the table of algorithms that are here."""

TORCH = "or write backend: torch, which does it."

Check = tuple[str, Callable[[Any], bool], str]

CHECKS: tuple[Check, ...] = (
    ("model.dtype", lambda value: value == "float64", "JAX counts in 32 bits here; write float32 or auto, " + TORCH),
    ("model.quantization", lambda value: value != "none", "weights are not quantised here; write none, " + TORCH),
    ("model.attention", lambda value: value == "varlen", "that is a kernel of torch; write auto."),
    ("model.trust_remote_code", bool, "code that lies in a model folder is for torch; write false, " + TORCH),
    ("qat.weight_dtype", lambda value: value is not None, "products are not rounded here; leave qat out, " + TORCH),
    ("qat.activation_dtype", lambda value: value is not None, "products are not rounded here; leave qat out, " + TORCH),
    ("training.fp8", bool, "matrices are multiplied in bfloat16 or float32 here; write false, " + TORCH),
    ("training.compile", bool, "JAX compiles whole steps, always; write false."),
    ("training.cuda_graphs", bool, "JAX compiles whole steps, always; write false."),
    ("distillation.teacher", lambda value: value is not None, "this engine has no teachers; leave it out, " + TORCH),
    ("optimizer.state", lambda value: value != "full", "masters and moments are float32 here; write full, " + TORCH),
    (
        "training.activation_checkpointing",
        lambda value: value in ("offload", "memory_budget"),
        "JAX keeps what it keeps on its device here; write full, " + TORCH,
    ),
    ("checkpoint.max_shard_size", lambda value: value != "50GB", "files hold 5 GB here; leave it out, " + TORCH),
    (
        "checkpoint.async_mode",
        lambda value: value != "disabled",
        "checkpoints are written between two steps here; write disabled, " + TORCH,
    ),
    ("monitoring.profile", bool, "steps are not taken apart here; write false, " + TORCH),
)
"""Settings that change nothing here, or that this engine cannot honour: when, and what to write."""


def missing_packages() -> list[str]:
    """The line about JAX where it is not installed."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    return [MISSING.format(names=" and ".join(absent))] if absent else []


def refusals(recipe: Recipe) -> list[str]:
    """Why this recipe cannot run here, setting by setting, each with its remedy."""
    return [*_settings(recipe), *_algorithm(recipe), *_optimizer(recipe), *_parallelism(recipe)]


def _settings(recipe: Recipe) -> Iterator[str]:
    for path, is_refused, reason in CHECKS:
        value = value_at(recipe, path)
        if is_refused(value):
            yield f"{path}: found {value}; backend jax: {reason}"


def _algorithm(recipe: Recipe) -> Iterator[str]:
    adaptation = find_algorithm(recipe.algorithm).adaptation
    if adaptation not in ADAPTATIONS:
        yield f"algorithm: found {recipe.algorithm}; backend jax does not have it. Write algorithm: sft, {TORCH}"
    elif adaptation == "lora":
        yield from lora.problems(recipe)
    elif adaptation == "osft":
        yield from osft.problems(recipe)


def _parallelism(recipe: Recipe) -> Iterator[str]:
    """Settings of the section that this engine does not know, whichever there are."""
    for name, field in type(recipe.parallelism).model_fields.items():
        value = getattr(recipe.parallelism, name)
        if name not in DIVIDING and value != field.get_default(call_default_factory=True):
            yield (
                f"parallelism.{name}: found {value}; backend jax divides by {', '.join(DIVIDING)}. Leave it out, "
                f"{TORCH}"
            )


def _optimizer(recipe: Recipe) -> Iterator[str]:
    if recipe.optimizer.name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        yield f"optimizer.name: found {recipe.optimizer.name}; backend jax has {known}. Write one of these, {TORCH}"

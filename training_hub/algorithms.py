"""The table of algorithms: algorithm = objective x adaptation, under one or more contracts.

The objective says what is learned, the adaptation what may move. A contract is a name that users give as `backend`:
the defaults and parameter meanings of a known package, run by one of our engines. A new algorithm is one entry.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training_hub.errors import RecipeError
from training_hub.recipe import Recipe


@dataclass(frozen=True)
class Contract:
    """A backend name: which engine runs it, the defaults (by recipe path) that hold under it, and what it demands."""

    name: str
    engine: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """One algorithm: names of its objective and adaptation, settings it cannot do without, contracts by preference.

    summary: what it does for whoever runs it, in a line.
    """

    name: str
    summary: str
    objective: str
    adaptation: str
    required: tuple[str, ...]
    contracts: tuple[Contract, ...]

    def contract(self, name: str) -> Contract | None:
        return next((contract for contract in self.contracts if contract.name == name), None)


TORCH = Contract("torch", engine="torch")

# The second engine: the recipe's own defaults, on JAX.
JAX = Contract("jax", engine="jax")

# An adapter learns at about ten times the rate of the weights themselves (Schulman et al. 2025, "LoRA Without Regret").
TORCH_LORA = Contract("torch", engine="torch", defaults={"optimizer.lr": 2e-4})
JAX_LORA = Contract("jax", engine="jax", defaults={"optimizer.lr": 2e-4})

# training_hub 0.1.0, page "SFT": documented defaults; betas and clip from instructlab-training 0.16 `TrainingArgs`.
INSTRUCTLAB = Contract(
    "instructlab-training",
    engine="torch",
    defaults={
        "training.epochs": 1,
        "training.global_batch_size": 3840,
        "training.max_seq_len": 4096,
        "training.max_tokens_per_gpu": 60000,
        "optimizer.lr": 2e-6,
        "checkpoint.at_epoch": True,
    },
)

# training_hub 0.1.0, page "OSFT": what it lists as required; the defaults of mini_trainer 0.9 `TrainingArgs` are ours.
MINI_TRAINER = Contract(
    "mini-trainer",
    engine="torch",
    defaults={"training.epochs": 1},
    required=(
        "training.global_batch_size",
        "training.max_tokens_per_gpu",
        "training.max_seq_len",
        "optimizer.lr",
    ),
)

# training_hub 0.11, `lora_sft` and its backend: documented defaults. Here only what is trained by default differs: the
# assistant's words, where Unsloth's trainer is called so that it trains all tokens.
UNSLOTH = Contract(
    "unsloth",
    engine="torch",
    defaults={
        "training.epochs": 3,
        "training.global_batch_size": 2,
        "training.max_seq_len": 2048,
        "optimizer.lr": 2e-4,
        "lr_scheduler.name": "linear",
        "lr_scheduler.warmup_steps": 10,
        "lora.r": 16,
        "lora.alpha": 32,
    },
)

ALGORITHMS: dict[str, Algorithm] = {
    "sft": Algorithm(
        name="sft",
        summary="fine-tune every weight of a model on your rows (SFT)",
        objective="cross_entropy",
        adaptation="full",
        required=("model.path", "output"),
        contracts=(INSTRUCTLAB, TORCH, JAX),
    ),
    "osft": Algorithm(
        name="osft",
        summary="fine-tune and keep what the model knows, by the directions it uses least (OSFT)",
        objective="cross_entropy",
        adaptation="osft",
        required=("model.path", "output"),
        contracts=(MINI_TRAINER, TORCH, JAX),
    ),
    "lora_sft": Algorithm(
        name="lora_sft",
        summary="fine-tune a small adapter beside a frozen model (LoRA, QLoRA and their family)",
        objective="cross_entropy",
        adaptation="lora",
        required=("model.path", "output"),
        contracts=(UNSLOTH, TORCH_LORA, JAX_LORA),
    ),
}


def find_algorithm(name: str) -> Algorithm:
    """The entry of `name`. Raises RecipeError naming the nearest known one."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    near = difflib.get_close_matches(name, ALGORITHMS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"algorithm: {name!r} is not known; known: {', '.join(ALGORITHMS)}.{hint}")


def objective_of(recipe: Recipe) -> str:
    """The name of what a run of `recipe` minimises: that of its algorithm, or the distance from a teacher."""
    return find_algorithm(recipe.algorithm).objective if recipe.distillation.teacher is None else "distillation"


def engine_of(recipe: Recipe) -> str:
    """The engine that runs `recipe`: its contract's, or the backend's own name for one registered from outside."""
    contract = find_algorithm(recipe.algorithm).contract(recipe.backend)
    return contract.engine if contract else recipe.backend

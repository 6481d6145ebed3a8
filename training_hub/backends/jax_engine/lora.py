"""LoRA as an adaptation of the jax engine: the weights stay, two narrow matrices beside each trained one move.

y = x W^T + s (x A^T) B^T with A [r, in] and B [out, r], B = 0 at first. Source: Hu et al. 2021, arXiv:2106.09685.
What is read and written is PEFT's format; names in checkpoints are those of the torch engine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import LEFT, RIGHT, adapter_key, leaves
from training_hub.backends.jax_engine.weights import number_format, size_of
from training_hub.backends.shared.freezing import Turns
from training_hub.backends.shared.sameness import Shapes
from training_hub.errors import RecipeError
from training_hub.folders import write_json
from training_hub.recipe import Recipe
from training_hub.recipe.adapter_folder import CONFIG_FILE, ORIGIN_FILE, WEIGHTS_FILE
from training_hub.recipe.lora import Lora as Settings
from training_hub.recipe.names import nearest
from training_hub.types import Console

RANK, ALPHA = 16, 32.0
"""Defaults, those of the torch engine."""

TUNERS = ("lora", "rslora")
ALL_LINEAR = "all-linear"
PEFT = "base_model.model."
TORCH = "or write backend: torch, which does it."

ABSENT: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "layer_replication": (None,),
    "target_parameters": (None, []),
}
"""Fields of an adapter's configuration, and the values under which it is plain LoRA."""

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """What an adapter is. targets: as PEFT takes them, a list of ends of names or a pattern for whole names."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    dropout: float
    targets: str | tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


def problems(recipe: Recipe) -> Iterator[str]:
    """What this engine's LoRA cannot do of what the recipe asks, each with its remedy; no weight is read."""
    asked = recipe.lora
    if asked.adapter is not None:
        yield from _folder_problems(Path(asked.adapter).expanduser())
    if asked.tuner not in TUNERS:
        yield f"lora.tuner: found {asked.tuner}; backend jax has {', '.join(TUNERS)}. Write one of these, {TORCH}"
    refused = {
        "modules_to_save": (bool(asked.modules_to_save), "no module is trained in full beside adapters; leave it out"),
        "trainable_tokens": (bool(asked.trainable_tokens), "no row of a table is trained alone; leave it out"),
        "options": (bool(asked.options), "these are fields of PEFT, which is not asked here; leave them out"),
        "merge": (asked.merge, "`training-hub merge` merges the adapter afterwards; write false"),
    }
    for name, (is_refused, reason) in refused.items():
        if is_refused:
            yield f"lora.{name}: found {getattr(asked, name)}; backend jax: {reason}, {TORCH}"


def _folder_problems(folder: Path) -> Iterator[str]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            yield f"lora.adapter: {folder} holds no {name}. Give a folder that PEFT or a run of ours wrote."
            return
    said = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for name, plain in ABSENT.items():
        if said.get(name) not in plain:
            yield f"lora.adapter: {folder}: {name} is {said[name]!r}; backend jax goes on with plain LoRA. {TORCH[3:]}"


def plan_of(settings: Settings) -> Plan:
    """The adapter that the recipe asks for, or that of the folder that it goes on with."""
    if settings.adapter is not None:
        said = json.loads((Path(settings.adapter).expanduser() / CONFIG_FILE).read_text(encoding="utf-8"))
        targets = said["target_modules"]
        chosen = targets if isinstance(targets, str) else tuple(sorted(targets))
        dropout = float(said.get("lora_dropout") or 0.0)
        return Plan(said["r"], float(said["lora_alpha"]), bool(said.get("use_rslora")), dropout, chosen)
    targets = ALL_LINEAR if settings.target_modules is None else settings.target_modules
    return Plan(
        settings.r or RANK,
        float(settings.alpha or ALPHA),
        settings.tuner == "rslora",
        settings.dropout or 0.0,
        targets if isinstance(targets, str) else tuple(targets),
    )


class LowRank:
    """What trains beside a model's matrices. Raises RecipeError where a target is none of its linear layers."""

    undecayed: frozenset[str] = frozenset()
    file: str | None = WEIGHTS_FILE
    own_format: str | None = "float32"
    turns = Turns()

    def __init__(self, recipe: Recipe, shape: Shape, dtype: str):
        self._recipe, self._shape, self._dtype = recipe, shape, dtype
        self._plan = plan_of(recipe.lora)
        self.scale, self.dropout = self._plan.scale, self._plan.dropout
        self._sides = {}
        for key, leaf in leaves(shape):
            if leaf.is_linear:
                size = size_of(leaf, key, shape)
                self._sides[key] = size[::-1] if leaf.is_transposed else size
        self._chosen = chosen(self._plan.targets, [_module(key) for key in self._sides])

    def shapes(self) -> Shapes:
        found: Shapes = {}
        for key, (rows, columns) in self._sides.items():
            if _module(key) in self._chosen:
                found[adapter_key(key, LEFT)] = (rows, self._plan.rank)
                found[adapter_key(key, RIGHT)] = (self._plan.rank, columns)
        return found

    def staying(self, formats: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], str]]:
        sizes = ((key, size_of(leaf, key, self._shape)) for key, leaf in leaves(self._shape))
        return {key: (size, self._dtype if len(size) > 1 else "float32") for key, size in sizes}

    def split(self, weights: Weights) -> tuple[Weights, Weights]:
        """The adapter, new or as it was, and the model; matrices in the format that is computed in."""
        lower = {
            key: weight.astype(number_format(self._dtype)) if weight.ndim >= 2 else weight
            for key, weight in weights.items()
        }
        folder = self._recipe.lora.adapter
        return (self._new() if folder is None else self._taken(Path(folder).expanduser())), lower

    def _new(self) -> Weights:
        """B = 0, and A uniform within 1 / sqrt(in), as PEFT begins."""
        random = np.random.default_rng(self._recipe.seed)
        found: Weights = {}
        for name, size in self.shapes().items():
            bound = 1 / math.sqrt(size[1])
            drawn = random.uniform(-bound, bound, size) if RIGHT in name else np.zeros(size)
            found[name] = drawn.astype(np.float32)
        return found

    def _taken(self, folder: Path) -> Weights:
        held, wanted = load_file(folder / WEIGHTS_FILE), self.shapes()
        names = {_in_peft(name): name for name in wanted}
        if held.keys() != names.keys():
            other = sorted(held.keys() ^ names.keys())
            raise RecipeError(f"lora.adapter: {folder} is not of this model: {', '.join(other[:5])}.")
        return {names[name]: tensor.astype(np.float32) for name, tensor in held.items()}

    def tensors(self, trained: Weights, frozen: Weights, formats: Mapping[str, str]) -> Weights:
        wanted = self._recipe.model.save_dtype
        dtype = number_format("float32" if wanted == "auto" else wanted)
        return {_in_peft(name): tensor.astype(dtype) for name, tensor in sorted(trained.items())}

    def write(self, tensors: Weights, folder: Path, dtype: str | None) -> None:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        chosen, plan = self._recipe.model, self._plan
        place = Path(chosen.path).expanduser()
        content = {
            "base_model_name_or_path": str(place.resolve()) if place.is_dir() else chosen.path,
            "revision": chosen.revision,
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": plan.rank,
            "lora_alpha": plan.alpha if plan.alpha % 1 else int(plan.alpha),
            "use_rslora": plan.is_rank_stabilised,
            "lora_dropout": plan.dropout,
            "bias": "none",
            "fan_in_fan_out": self._shape.is_gpt2,
            "target_modules": self._targets(),
        }
        write_json(folder / CONFIG_FILE, content)
        write_json(folder / ORIGIN_FILE, {"quantization": "none", "dtype": self._dtype, "versions": {}})

    def _targets(self) -> str | list[str]:
        """The targets as PEFT's configuration holds them."""
        targets = self._plan.targets
        if targets == ALL_LINEAR:
            return sorted({name.rpartition(".")[2] for name in self._chosen})
        return targets if isinstance(targets, str) else sorted(targets)

    def read(self, folder: Path, console: Console) -> Weights:
        return self._taken(folder)


def chosen(targets: str | Iterable[str], modules: list[str]) -> set[str]:
    """The modules that get an adapter. Raises RecipeError for a target that is the end of no linear layer's name."""
    if targets == ALL_LINEAR:
        return set(modules)
    ends = sorted({name.rpartition(".")[2] for name in modules})
    if isinstance(targets, str):
        found = {name for name in modules if re.fullmatch(targets, name)}
        wrong = [] if found else [targets]
    else:
        wanted = list(targets)
        found = {name for name in modules for end in wanted if name == end or name.endswith(f".{end}")}
        wrong = [end for end in wanted if not any(name == end or name.endswith(f".{end}") for name in modules)]
    if wrong or not found:
        near = nearest(wrong[0], ends) if wrong else None
        hint = f" Did you mean {near}?" if near else ""
        raise RecipeError(
            f"lora.target_modules: {', '.join(map(repr, wrong)) or 'an empty list'} matches no linear layer of the "
            f"model's blocks.{hint} Ends of their names: {', '.join(ends)}."
        )
    return found


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _in_peft(name: str) -> str:
    """The name in PEFT's file of what this engine and the torch engine call `name`."""
    return PEFT + name.replace(".default.", ".")

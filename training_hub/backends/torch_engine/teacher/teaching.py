"""Where the word of a teacher comes from: a model beside the student, or what it said before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training_hub.backends.torch_engine.attention_trial import TIMED_TOKENS
from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.loading.model import choose_dtype
from training_hub.backends.torch_engine.objectives.distillation import Teaching
from training_hub.backends.torch_engine.objectives.targets import Targets, WholeTargets
from training_hub.backends.torch_engine.parallel import ALONE
from training_hub.backends.torch_engine.teacher.facts import TeacherFacts, told_of_teacher
from training_hub.backends.torch_engine.teacher.form import Form
from training_hub.backends.torch_engine.teacher.kept import Condensed, kept_teaching
from training_hub.backends.torch_engine.teacher.online import Online, load_teacher
from training_hub.backends.torch_engine.tensors import PackTensors
from training_hub.data.store import TokenStore
from training_hub.recipe import Recipe
from training_hub.types import Console


@dataclass(frozen=True)
class Elsewhere:
    """The teaching of a process that has no last layers: what the student says, and so how far that is from what the
    teacher does, it hears from another."""

    common: int

    def targets(self, pack: PackTensors) -> Targets:
        """Nothing that anybody looks at."""
        return WholeTargets(self.common)

    def on_excerpts(self) -> Elsewhere:
        return self


# Tokens that a teacher reads at once before training; more only cost memory.
READ_AT_ONCE = {"cpu": 8192, "cuda": 32768}


def open_teaching(
    recipe: Recipe,
    facts: TeacherFacts | None,
    store: TokenStore,
    device: torch.device,
    console: Console,
    *,
    keeps: bool = True,
    layout: Layout = WHOLE,
) -> Teaching | None:
    """Where the word of the recipe's teacher on the samples of `store` comes from; None where there is no teacher.

    keeps=False: nothing is made for later; what would be kept is made where it is asked for. layout: how the student
    lies over processes. Those with its last stage ask the teacher in each step. Where the student lies in slices, the
    teacher does, too, and all processes must call this together.
    """
    if facts is None:
        return None

    mesh = layout.mesh if layout.is_sharded else None

    def load() -> Online:
        lengths: list[int] = store.lengths[:TIMED_TOKENS].tolist()
        return load_teacher(recipe, facts, device, console, lengths, mesh)

    if recipe.distillation.cache == "none":
        if layout.has_last_stage:
            return load()
        console.say(f"teacher: {facts.chosen.path} is loaded and asked by the process with the last stage")
        return Elsewhere(facts.common)
    if not keeps:
        return Condensed(load(), Form.of(recipe.distillation, facts.common, recipe.seed))
    with told_of_teacher():
        dtype = choose_dtype(facts.chosen.dtype, device)
    most = READ_AT_ONCE[device.type]
    budget = max(int(store.lengths.max()), min(recipe.training.max_tokens_per_gpu or most, most))
    group = ALONE if mesh is None else layout.group
    return kept_teaching(recipe, facts, store, dtype, load, budget, console, group)

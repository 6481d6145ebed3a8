"""What the settings of a distillation ask that cannot be, or that would do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from training_hub.recipe.findings import Contradiction, Names, is_default

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe

TEACHER, ALPHA = "distillation.teacher", "distillation.alpha"
DIVERGENCE, CACHE, PROMPT = "distillation.divergence", "distillation.cache", "distillation.prompt"


def about_the_teacher(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    """Everything about the section `distillation`, and what other sections say to it."""
    checks = (_cache, _cross_entropy, _prompt) if recipe.distillation.teacher is not None else (_without_teacher,)
    for check in checks:
        yield from check(recipe, names)


def _without_teacher(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    for path in (f"distillation.{name}" for name in type(recipe.distillation).model_fields):
        if not is_default(recipe, path):
            yield Contradiction(
                (path, TEACHER),
                f"{names(path)}: it would change nothing without a teacher. "
                f"Write {names.write(TEACHER, 'path/to/teacher')}, or leave {path} out.",
            )


def _cache(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    asked = recipe.distillation
    if asked.cache == "sampled" and asked.divergence != "forward_kl":
        yield Contradiction(
            (CACHE, DIVERGENCE),
            f"{names(CACHE)}: sampled keeps tokens whose mean is the teacher, which is all that forward_kl asks for, "
            f"and less than {asked.divergence} does. Write {names.write(DIVERGENCE, 'forward_kl')}, or "
            f"{names.write(CACHE, 'top_k')}.",
        )


def _cross_entropy(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    for path in ("loss.label_smoothing", "loss.z_loss", "loss.dft"):
        if recipe.distillation.alpha == 1 and not is_default(recipe, path):
            yield Contradiction(
                (path, ALPHA),
                f"{names(path)}: it is about cross-entropy, of which {names(ALPHA)}: 1 leaves none. Write "
                f"{names.write(ALPHA, 0.7)}, or leave {path} out.",
            )


def _prompt(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    if recipe.distillation.prompt is not None and recipe.data.pretraining:
        yield Contradiction(
            (PROMPT, "data.pretraining"),
            f"{names(PROMPT)}: a system message is for conversations, and {names('data.pretraining')} joins documents. "
            "Leave one out.",
        )

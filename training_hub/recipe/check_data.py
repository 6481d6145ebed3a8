"""What is at odds in which rows are read, and how far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from training_hub.recipe.findings import Contradiction, Names, plainly, value_at

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe

STREAMING = "data.streaming"


def about_validation(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    """A list of validation sets has at least one, and is not cut to its first samples."""
    path, samples = "data.validation", "data.validation_samples"
    listed = recipe.data.validation
    if listed == []:
        yield Contradiction((path,), f"{names(path)}: found an empty list. Write {names.write(path, 'FILE.jsonl')}.")
    if isinstance(listed, list) and len(listed) > 1 and recipe.data.validation_samples is not None:
        yield Contradiction(
            (samples, path),
            f"{names(samples)}: {recipe.data.validation_samples} would be those of the first of {len(listed)} sets in "
            f"{names(path)}. Name one set, or leave {samples} out.",
        )


def about_streaming(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    """Reading only as far as the run needs asks for steps and one source, and for nothing that looks at all rows."""
    if not recipe.data.streaming:
        return
    if recipe.training.steps is None:
        yield Contradiction(
            (STREAMING, "training.steps"),
            f"{names(STREAMING)}: reads as far as {names('training.steps')} needs, which is not given. Write "
            f"{names.write('training.steps', 1000)}.",
        )
    if isinstance(recipe.data.path, list) and len(recipe.data.path) > 1:
        yield Contradiction(
            (STREAMING, "data.path"),
            f"{names(STREAMING)}: reads one source from its beginning, and {names('data.path')} has "
            f"{len(recipe.data.path)}. Name one, or write {names.write(STREAMING, False)}.",
        )
    for path in ("data.validation_fraction", "data.deduplicate"):
        if value_at(recipe, path):
            remedy = "Give a file as data.validation" if path.endswith("fraction") else f"Leave {names(path)} out"
            yield Contradiction(
                (STREAMING, path),
                f"{names(path)}: {plainly(value_at(recipe, path))} needs all rows, and {names(STREAMING)} reads only "
                f"some. {remedy}, or write {names.write(STREAMING, False)}.",
            )

"""What is at odds in how far rows are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from training_hub.recipe.findings import Contradiction, Names, plainly, value_at

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe

STREAMING = "data.streaming"


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

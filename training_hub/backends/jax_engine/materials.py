"""What a run is made from, before any weight is loaded: config, tokenizer, template, token stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.backends import Given
from training_hub.backends.jax_engine.shapes import Shape, folder_of, read_config, shape_of
from training_hub.backends.shared.materials import check_limits, limits_of, stop_ids, watched_rows
from training_hub.data.prepare import Prepared, prepare
from training_hub.data.questions import questions_of
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate, resolve_template
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.evaluation.judging import metrics_of
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import rows_generated
from training_hub.types import Console


@dataclass(frozen=True)
class Materials:
    """What a run is made from. source: the folder that the model lies in; metrics: functions that were handed over."""

    source: Path
    config: Any
    shape: Shape
    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    prepared: Prepared
    watch: TokenStore | None
    metrics: tuple[Callable[..., Any], ...] = ()

    @property
    def stop_ids(self) -> list[int]:
        """The ids at which the model stops."""
        return stop_ids(self.tokenizer, self.prepared.train)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that is trained or measured."""
        stores = (self.prepared.train, self.prepared.validation, self.watch)
        return max(int(store.lengths.max()) for store in stores if store is not None)


def load_materials(
    recipe: Recipe, given: Given, console: Console, rejects: Path | None = None, *, with_weights: bool = True
) -> Materials:
    """All of it. Every problem of the data, and of what it and the model have in common, is raised here.

    Rows that are left out are listed in the file `rejects`.
    """
    if given.tokenizer is not None:
        tokenizer = ChatTokenizer.wrap(given.tokenizer)
    else:
        tokenizer = ChatTokenizer.load(recipe.model.tokenizer or recipe.model.path, revision=recipe.model.revision)
    template = resolve_template(recipe.data.chat_template, tokenizer)
    prepared = prepare(
        recipe,
        tokenizer=tokenizer,
        template=template,
        console=console,
        rows=given.rows,
        validation_rows=given.validation_rows,
        rejects=rejects,
    )
    if recipe.evaluation.generate and prepared.validation is not None:
        questions_of(prepared.validation, rows_generated(recipe.evaluation))  # refuses rows that ask nothing
        metrics_of(recipe.evaluation.metrics, given.metrics)  # refuses functions that are not there
    watch = watched_rows(recipe, tokenizer, template, console) if recipe.evaluation.watch else None
    config = read_config(recipe.model)
    for store in (prepared.train, prepared.validation, watch):
        if store is not None:
            check_limits(store, limits_of(config), console)
    source = folder_of(recipe.model, with_weights=with_weights)
    return Materials(source, config, shape_of(config), tokenizer, template, prepared, watch, tuple(given.metrics))

"""The actor of a run, and what any actor must be able to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from training_hub.algorithms import engine_of
from training_hub.backends import Examiner, Given, find_backend
from training_hub.errors import BackendError, LaunchError
from training_hub.folders import tidy
from training_hub.launch import as_json, refuse_damaged, run, willing_engine
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.saved import with_saved


class Actor(Protocol):
    """One process of a run, made with the recipe. Each call gives plain JSON; they come in this order, once each.

    After a process is lost all are made anew and begin again at `setup`, so what must last lies in the run folder.
    """

    def __init__(self, recipe: Recipe) -> None: ...

    def setup(self) -> Any: ...

    def train(self) -> Any: ...

    def evaluate(self) -> Any: ...

    def cleanup(self) -> Any: ...


class TrainerActor:
    """A run of the recipe, as one of the processes that torchrun's environment tells of, or alone."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._result: dict[str, Any] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process does what one does for all."""
        return os.environ.get("RANK", "0") == "0"

    def setup(self) -> dict[str, Any]:
        """Check everything that can be checked before data is read or a weight is loaded; raises what a run would."""
        willing_engine(self.recipe)
        return {"output": self.recipe.output, "newest_checkpoint": self._folder.newest_checkpoint()}

    def train(self) -> dict[str, Any]:
        """Train, from the newest checkpoint of the run folder where there is one; the result as result.json has it."""
        self._result = as_json(run(self.recipe, Given()))
        return self._result

    def evaluate(self) -> dict[str, float]:
        """Scores of the final model on data.validation, as the section `evaluation` asks for them.

        Without such rows, or without a final model, what the run measured last. {} in all processes but the first.
        """
        if self._result is None:
            raise LaunchError("evaluate: nothing was trained here. Call train first.")
        if not self.is_first:
            return {}
        model, rows = self._result["model_path"], self.recipe.data.validation
        if model is None or rows is None:
            return {name: value for name, value in self._result["metrics"].items() if name.startswith("validation_")}
        data = self.recipe.data.model_copy(update={"path": rows, "validation": None, "validation_fraction": 0.0})
        saved = with_saved(self.recipe.model_copy(update={"data": data}), model)
        engine = find_backend(engine_of(self.recipe))
        if not isinstance(engine, Examiner):
            raise BackendError(f"backend {engine.name!r} has no method examine, so its models cannot be evaluated.")
        return dict(engine.examine(saved, Given(), open_console(self.recipe.monitoring.console)).scores)

    def cleanup(self) -> dict[str, Any]:
        """Rid the run folder of what killed processes left, and compare the final model with its manifest, by sha256.

        Raises CheckpointError where it is not what was written.
        """
        if not self.is_first:
            return {}
        tidy(self._folder.path)
        if self._folder.final.exists():
            refuse_damaged(self._folder)
        return {"final": str(self._folder.final) if self._folder.final.exists() else None}

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(Path(self.recipe.output))

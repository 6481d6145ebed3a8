"""Runs of the jax engine in a process of its own: `python -m tests.backends.jax_engine.divided recipes.json`.

Prints the losses of each and how its devices lay, or the error that ended it, as one line of JSON. A recipe may say
with stop_at the step after which the plug is pulled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from training_hub.backends import Given
from training_hub.errors import TrainingError
from training_hub.launch import run
from training_hub.recipe import Recipe


def done(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a run of this recipe came to."""
    stop_at = recipe.pop("stop_at", None)

    def pull(report: Any) -> None:
        if report.step == stop_at:
            raise KeyError("the plug was pulled")

    try:
        result = run(Recipe.model_validate(recipe), Given(watchers=[pull]))
    except TrainingError as error:
        return {"error": str(error)}
    return {"losses": [row["loss"] for row in result.history], "devices": result.plan["devices"]}


if __name__ == "__main__":
    print(json.dumps([done(one) for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]))

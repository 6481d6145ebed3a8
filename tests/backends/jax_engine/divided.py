"""Runs of the jax engine in a process of its own: `python -m tests.backends.jax_engine.divided recipes.json`.

Prints the losses of each and how its devices lay, as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    made = []
    for recipe in asked:
        result = run(Recipe.model_validate(recipe))
        made.append({"losses": [row["loss"] for row in result.history], "devices": result.plan["devices"]})
    print(json.dumps(made))

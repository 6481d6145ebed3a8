"""One process of several that ask saved models: `python -m training_hub.launch.examiner evaluation.json`.

Started by the supervisor, which says in the environment which one it is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from training_hub.algorithms import engine_of
from training_hub.backends import Given, JointExaminer, find_backend
from training_hub.errors import BackendError
from training_hub.evaluation.predictions import sitting_as_json
from training_hub.launch.stopping import broken_off
from training_hub.launch.worker import begin, end, serve
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.recipe.recipe import TOLD_BY_CALLER


def main(path: str) -> int:
    """Ask the models of the file's recipes; leave what came of it, or the error, in the file's folder."""
    begin()
    asked = json.loads(Path(path).read_text(encoding="utf-8"))

    def examine() -> dict[str, Any]:
        recipes = [Recipe.model_validate(one, context=TOLD_BY_CALLER) for one in asked["recipes"]]
        engine = find_backend(engine_of(recipes[0]))
        if not isinstance(engine, JointExaminer):
            raise BackendError(f"backend {engine.name!r} has no method examine_together(recipes, given, console, own).")
        found = engine.examine_together(recipes, Given(), open_console(recipes[0].monitoring.console))
        is_read = os.environ["LOCAL_RANK"] == "0"  # by who started the processes of this node; all say the same
        # As text: a perplexity may be infinite, which no file of ours holds as a number.
        return {"sittings": json.dumps([sitting_as_json(one) for one in found])} if is_read else {}

    return serve(Path(asked["folder"]), examine, broken_off)


if __name__ == "__main__":
    end(main(sys.argv[1]))

"""One process with an actor in it: takes calls as lines of JSON, answers each with a line of JSON.

{"actor": "package.module:Class", "recipe": "YAML"}   makes the actor
{"call": "train"}                                      -> {"value": ...} or {"error": {...}}
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from typing import Any

from training_hub.launch.actors.calls import actor_class, ending_of
from training_hub.launch.supervisor import PARENT
from training_hub.launch.worker import die_with
from training_hub.recipe.load import load


def main() -> None:
    """Serve the process that started this one, for as long as that lives."""
    die_with(int(os.environ[PARENT]))
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the run prints must not be taken for an answer
    actor: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "actor" in order:
                actor, value = actor_class(order["actor"])(load(order["recipe"])), None
            else:
                value = getattr(actor, order["call"])()
            answer = {"value": value}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": asdict(ending_of(error))}
        print(json.dumps(answer, default=str), file=answers, flush=True)
    os._exit(0)  # taking torch apart takes seconds


if __name__ == "__main__":
    main()

"""One process of a crew: takes runs as lines of JSON, does each as the rank it is told, answers with a line of JSON.

Importing torch and transformers takes longer than a tiny run, so a crew serves a whole module of tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from training_hub.backends import Given
from training_hub.errors import HubError
from training_hub.launch import as_json, run
from training_hub.recipe import Recipe


def do(order: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """The run of `order` as torchrun would have started this process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(order["port"]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    recipe = Recipe.model_validate(order["recipes"][rank])
    if rank == order.get("signalled"):
        threading.Thread(target=signal_at, args=(Path(recipe.output), order["step"]), daemon=True).start()
    if rank == order.get("signalled_in_save"):
        threading.Thread(target=signal_in_save, args=(Path(recipe.output),), daemon=True).start()
    try:
        result = run(recipe, Given())
    except HubError as error:
        return {"error": type(error).__name__, "problems": error.problems}
    return {**as_json(result), "history": list(result.history)}


def signal_at(output: Path, step: int) -> None:
    """Send this process a SIGTERM when the metrics tell of `step`."""
    file = output / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < step:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def signal_in_save(output: Path) -> None:
    """Send this process a SIGTERM while a checkpoint is half written."""
    while not list(output.glob("checkpoints/.tmp-step-*")):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not be taken for an answer
    import training_hub.backends.torch_engine.engine  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(do(json.loads(line), rank, world_size), default=str), file=answers, flush=True)
    os._exit(0)  # taking torch apart takes seconds


if __name__ == "__main__":
    main()

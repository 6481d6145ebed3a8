"""The processes of a crew: each takes runs as lines of JSON, does them as its rank, answers with a line of JSON.

Importing torch and transformers takes longer than a tiny run, so it is done once for all processes of a crew, which
are forks of one that has computed nothing yet, and a crew serves a whole module of tests.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.moments import act_in, hold, when_named
from training_hub.backends import Given
from training_hub.errors import HubError
from training_hub.launch import as_json, run
from training_hub.recipe import Recipe
from training_hub.recipe.comm import Comm
from training_hub.types import StepReport


def do(order: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """The run or the call of `order` as torchrun would have started this process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(order["port"]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if "call" in order:
        return answer(order)
    if "evaluate" in order:
        return evaluated(order["evaluate"])
    recipe = Recipe.model_validate(order["recipes"][rank])
    try:
        result = run(recipe, Given(watchers=troubled(order, rank, Path(recipe.output))))
    except HubError as error:
        return {"error": type(error).__name__, "problems": error.problems}
    except Exception as error:  # the crew goes on; the test sees which error it was, and the log where
        traceback.print_exc()
        return {"error": type(error).__name__, "problems": [str(error)]}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {**as_json(result), "history": list(result.history)}


def evaluated(asked: dict[str, Any]) -> dict[str, Any]:
    """Scores and predictions of saved models."""
    from training_hub import evaluate

    try:
        found = evaluate(**asked)
    except HubError as error:
        return {"error": type(error).__name__, "problems": error.problems}
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "problems": [str(error)]}
    return {"scores": found.scores, "predictions": found.predictions}


def answer(order: dict[str, Any]) -> dict[str, Any]:
    """What the function that `order` names, as module:function, finds among its processes."""
    from training_hub.backends.torch_engine.parallel import joined

    module, function = order["call"].split(":")
    try:
        with joined(Comm()) as group:
            return {"found": getattr(import_module(module), function)(group, *order["arguments"])}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def signal_here() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def limit_here() -> None:
    """Let no file of this process grow beyond 20 kB any more, as if its disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


# What happens to the rank that an order names, and whether it does after a step or before its checkpoint has a name.
TROUBLES: dict[str, tuple[Callable[[], None], bool]] = {
    "signalled": (signal_here, False),
    "signalled_in_save": (signal_here, True),
    "limited": (limit_here, True),
}


def troubled(order: dict[str, Any], rank: int, output: Path) -> tuple[Callable[[StepReport], None], ...]:
    """Get ready for the trouble that an order asks for: in rank 0, which knows the moment and holds there meanwhile,
    and in the rank that has it; gives the watchers that the run needs for it. Where no step is named it is there from
    the start."""
    name = next((name for name in TROUBLES if name in order), None)
    if name is None:
        return ()
    act, is_in_save = TROUBLES[name]
    if "step" not in order:
        if rank == order[name]:
            act()
        return ()
    moment, step = Path(order["moment"]), order["step"]
    here = act if order[name] == 0 else partial(hold, moment)
    if rank > 0 and rank == order[name]:
        threading.Thread(target=act_in, args=(moment, act), daemon=True).start()
    if rank > 0:
        return ()
    if is_in_save:
        when_named(output / "checkpoints" / f"step-{step}", here)
        return ()
    return (lambda report: here() if report.step == step else None,)


def main() -> None:
    """Fork a process for each pair of pipes that is named: from where it gets its orders, and where it answers."""
    pairs = [tuple(map(int, pair.split(":"))) for pair in sys.argv[1:]]
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401  # which torch loads when weights are first divided
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401

    import training_hub.backends.torch_engine.engine  # noqa: F401

    for rank, (orders, answers) in enumerate(pairs):
        if os.fork() == 0:
            for other in (end for pair in pairs for end in pair if pair[0] != orders):
                os.close(other)
            serve(rank, len(pairs), orders, answers)
    for orders, answers in pairs:
        os.close(orders)
        os.close(answers)
    for _ in pairs:
        os.wait()


def serve(rank: int, world_size: int, orders: int, answers: int) -> None:
    with os.fdopen(orders) as lines, os.fdopen(answers, "w") as said:
        for line in lines:
            print(json.dumps(do(json.loads(line), rank, world_size), default=str), file=said, flush=True)
    os._exit(0)  # taking torch apart takes seconds


if __name__ == "__main__":
    main()

"""Processes that train together, kept for many runs: what torchrun would start anew for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

from tests.invariants.run import recipe
from tests.ports import free_port


class Crew:
    """`world_size` processes that wait for runs."""

    def __init__(self, world_size: int, log: Path):
        self._numbers = count()
        orders = [os.pipe() for _ in range(world_size)]
        answers = [os.pipe() for _ in range(world_size)]
        theirs = [(order[0], answer[1]) for order, answer in zip(orders, answers, strict=True)]
        with log.open("w") as file:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.member", *(f"{get}:{give}" for get, give in theirs)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=[end for pair in theirs for end in pair],
            )
        for end in (end for pair in theirs for end in pair):
            os.close(end)
        self._orders = [os.fdopen(order[1], "w") for order in orders]
        self._answers = [os.fdopen(answer[0]) for answer in answers]

    def close(self) -> None:
        for end in (*self._orders, *self._answers):
            end.close()
        self._parent.wait(timeout=120)

    def train(self, model: Path, data: Path | list[Path], output: Path, /, order: Any = None, **sections: Any) -> Any:
        """What each rank's run came to; `data` may be another for each rank.

        order: {"signalled": 1, "step": 2} is a SIGTERM for rank 1 after step 2; "signalled_in_save" and "limited" (a
        full disk) come to a rank where the checkpoint of `step` is about to get its name.
        """
        each = data if isinstance(data, list) else [data] * len(self._orders)
        recipes = [recipe(model, one, output, **sections).model_dump(mode="json") for one in each]
        moment = output.parent / f"{output.name}-moment-{next(self._numbers)}"
        return self._ask({"recipes": recipes, "moment": str(moment), **(order or {})})

    def evaluate(self, model: Path | list[Path], data: Path, *metrics: str, **asked: Any) -> list[Any]:
        """What `evaluate` finds in each of the processes: scores and predictions, or the error."""
        models = [str(one) for one in model] if isinstance(model, list) else str(model)
        return self._ask({"evaluate": {"model": models, "data": str(data), "metrics": metrics, **asked}})

    def call(self, function: str, *arguments: Any) -> list[Any]:
        """What `module:function`, called with the group of the processes and `arguments`, finds in each of them."""
        answers = self._ask({"call": function, "arguments": arguments})
        assert not [each["error"] for each in answers if "error" in each], answers
        return [each["found"] for each in answers]

    def _ask(self, order: dict[str, Any]) -> list[Any]:
        line = json.dumps({"port": free_port(), **order})
        for member in self._orders:
            member.write(line + "\n")
            member.flush()
        return [json.loads(member.readline()) for member in self._answers]

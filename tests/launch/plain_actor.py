"""Actors that lose a process or fail, in a module of their own, since other processes import them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.moments import when_named
from training_hub import TrainerActor
from training_hub.errors import DataError
from training_hub.recipe import Recipe


class Plain:
    """It needs no engine, so that only the mesh is seen. By the seed of its recipe: 1, 3 lose a process, 2 fails."""

    def __init__(self, recipe: Recipe) -> None:
        self.output, self.seed, self.rank = Path(recipe.output), recipe.seed, int(os.environ["RANK"])
        self.output.mkdir(parents=True, exist_ok=True)

    def setup(self) -> int:
        with (self.output / f"setups{self.rank}").open("a") as file:
            file.write("x")
        return self.rank

    def train(self) -> dict[str, int]:
        begun = len((self.output / f"setups{self.rank}").read_text())
        if self.seed == 1 and self.rank == 1 and begun <= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == 2 and self.rank == 1:
            raise DataError("row 3: no.")
        if self.seed == 3 and self.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        print("rank", self.rank, "prints what might be taken for an answer")
        return {"begun": begun}

    def evaluate(self) -> dict[str, int]:
        return {"rank": self.rank}

    def cleanup(self) -> str:
        return os.environ["WORLD_SIZE"]


class Killed:
    """A TrainerActor whose last process the first kills with SIGKILL, once, while it saves the sixth step."""

    def __init__(self, recipe: Recipe) -> None:
        self.inner = TrainerActor(recipe)
        self.output = Path(recipe.output)

    def setup(self) -> Any:
        rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
        if rank == last:
            (self.output / "pid").write_text(str(os.getpid()))
        if rank == 0 and not (self.output / "killed").exists():
            when_named(self.output / "checkpoints" / "step-6", self.kill)
        return self.inner.setup()

    def kill(self) -> None:
        (self.output / "killed").touch()
        os.kill(int((self.output / "pid").read_text()), signal.SIGKILL)

    def train(self) -> Any:
        return self.inner.train()

    def evaluate(self) -> Any:
        return self.inner.evaluate()

    def cleanup(self) -> Any:
        return self.inner.cleanup()

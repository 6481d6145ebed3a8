"""Engines: what turns a recipe into a trained model.

A backend is two methods. One from outside is found through the entry-point group `training_hub.backends`:

    [project.entry-points."training_hub.backends"]
    mine = "my_package:MyBackend"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from training_hub.errors import BackendError
from training_hub.evaluation.predictions import Reply, Sitting
from training_hub.recipe import Recipe
from training_hub.types import Console, Message, StepReport, TrainResult

Watcher = Callable[[StepReport], None]

OwnMetrics = Sequence[Callable[..., Any]]
"""Metrics of the user's, as functions."""

LISTEN_FD = "TRAINING_HUB_LISTEN_FD"
"""Environment of rank 0: number of a socket that listens already, at which it is to answer the others."""

RUN_ID = "TRAINING_HUB_RUN_ID"
"""Environment of each process of a run that has several: the name that they share."""

HEARS_TWICE = "TRAINING_HUB_HEARS_TWICE"
"""Environment of a process that a signal may reach both from its supervisor and from who signalled that one."""


@dataclass(frozen=True)
class Given:
    """Live objects handed over beside the recipe; each stands in for what the recipe would name.

    rows, validation_rows: DataFrame, `datasets` object, or an iterable of dictionaries. watchers: called with each
    report. metrics: functions that evaluation.metrics names as live:NAME.
    """

    model: Any = None
    tokenizer: Any = None
    rows: Any = None
    validation_rows: Any = None
    watchers: Sequence[Watcher] = ()
    metrics: Sequence[Callable[..., Any]] = ()


@runtime_checkable
class Backend(Protocol):
    """What an engine is."""

    name: str

    def objections(self, recipe: Recipe) -> list[str]:
        """Why this recipe cannot run here, each with its remedy; [] where it can. Asked before anything is loaded."""
        ...

    def train(self, recipe: Recipe, given: Given) -> TrainResult:
        """Run the recipe to its end."""
        ...


@runtime_checkable
class Several(Protocol):
    """What an engine may be able to do beside: train in several processes, each of which is told by torchrun's
    environment (RANK, WORLD_SIZE, MASTER_ADDR) which one it is."""

    name: str

    def num_devices(self) -> int:
        """How many processes `auto` and `gpu` mean on this node."""
        ...


@runtime_checkable
class Planner(Protocol):
    """What an engine may be able to do beside: say what a run will do and take, without loading weights."""

    name: str

    def plan(self, recipe: Recipe, console: Console, *, measures: bool) -> dict[str, Any]:
        """The plan of a run of this recipe here, as plain JSON. measures: with `time`, by a quick measurement."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """What an engine may be able to do beside: score a model on rows that it was not trained on."""

    name: str

    def score(self, recipe: Recipe, console: Console, *, generates: bool) -> dict[str, float]:
        """Scores of the model of model.path on the rows of data.path: `rows`, `loss` in nats per trained token, and,
        where it generates answers, `exact_match`, the share of rows answered as the row says."""
        ...


@runtime_checkable
class Examiner(Protocol):
    """What an engine may be able to do beside: let a saved model answer rows, and compare."""

    name: str

    def objections(self, recipe: Recipe) -> list[str]:
        """Why this recipe's model cannot be loaded here, each with its remedy."""
        ...

    def examine(self, recipe: Recipe, given: Given, console: Console, own: OwnMetrics = ()) -> Sitting:
        """Answers and scores of the model of model.path on the rows of data.path or `given`, as recipe.evaluation asks.

        own: metrics of the user's, as functions.
        """
        ...


@runtime_checkable
class JointExaminer(Protocol):
    """What an engine may be able to do beside: let saved models answer rows in several processes, each of which is told
    by torchrun's environment which one it is."""

    name: str

    def examine_together(
        self, recipes: Sequence[Recipe], given: Given, console: Console, own: OwnMetrics = ()
    ) -> list[Sitting]:
        """What `examine` gives for each recipe, which differ in the model alone, in each of the processes."""
        ...


class Voice(Protocol):
    """A model that one can talk to."""

    @property
    def has_template(self) -> bool:
        """Whether messages are shown to it by a chat template; else it goes on with their text."""
        ...

    def reply(
        self,
        messages: Sequence[Message],
        hear: Callable[[str], None],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Reply:
        """Its answer to the last message; `hear` is told of the text piece by piece."""
        ...


@runtime_checkable
class Speaker(Protocol):
    """What an engine may be able to do beside: let a saved model be talked to."""

    name: str

    def objections(self, recipe: Recipe) -> list[str]:
        """Why this recipe's model cannot be loaded here, each with its remedy."""
        ...

    def voice(self, recipe: Recipe) -> Voice:
        """The model of model.path, loaded."""
        ...


def _torch_engine() -> Backend:
    from training_hub.backends.torch_engine.engine import TorchEngine

    return TorchEngine()


def _jax_engine() -> Backend:
    from training_hub.backends.jax_engine.engine import JaxEngine

    return JaxEngine()


BUILT_IN: Mapping[str, Callable[[], Backend]] = {"torch": _torch_engine, "jax": _jax_engine}


def find_backend(name: str) -> Backend:
    """The engine called `name`, built in or installed. Raises BackendError listing the known ones."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    installed = entry_points(group="training_hub.backends")
    for point in installed:
        if point.name == name:
            return point.load()()
    known = sorted({*BUILT_IN, *(point.name for point in installed)})
    raise BackendError(f"backend {name!r} is not known; known: {', '.join(known)}.")

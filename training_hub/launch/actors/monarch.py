"""A mesh of actors on Monarch (torchmonarch), the same classes as in processes of our own.

Imported only where Monarch is asked for. Between its processes Monarch 0.7 sends pickled messages over sockets without
authentication: keep it on a network, or a machine, whose users you trust.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import monarch.actor as library
from monarch.actor import Actor, ActorError, endpoint, this_host
from monarch.spmd import setup_torch_elastic_env_async

from training_hub.launch.actors.calls import Lost, actor_class, ending_of, values_of
from training_hub.launch.layout import Layout
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.load import load


class Host(Actor):
    """A process of Monarch's with an actor of ours in it."""

    def __init__(self, actor: str, recipe: str) -> None:
        self._actor = actor_class(actor)(load(recipe))

    @endpoint
    def call(self, name: str) -> str:
        """The value or the error of a method, as JSON: an exception would cross as a pickle, and lose its type."""
        try:
            answer = {"value": getattr(self._actor, name)()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": asdict(ending_of(error))}
        return json.dumps(answer, default=str)


class MonarchMesh:
    """`layout.procs` actors on this host; what they print Monarch brings here, so there are no logs in `folder`."""

    def __init__(self, layout: Layout, actor: str, recipe: str, folder: RunFolder):
        self._layout, self._actor, self._recipe = layout, actor, recipe
        self._procs: Any = None
        self._hosts: Any = None
        self._faults: list[str] = []
        self._before: Callable[..., None] | None = None

    async def start(self) -> None:
        # Without a hook of ours Monarch ends this process where it has lost one of the mesh.
        self._before = library.unhandled_fault_hook
        library.unhandled_fault_hook = lambda failure: self._faults.append(str(failure))
        self._procs = this_host().spawn_procs(per_host={"procs": self._layout.procs})
        await setup_torch_elastic_env_async(self._procs)
        self._hosts = self._procs.spawn("training_hub", Host, self._actor, self._recipe)

    async def call(self, name: str) -> list[Any]:
        """What each actor's method gives, by rank. Raises the first actor's error, or Lost for one that is gone."""
        try:
            answers = await self._hosts.call.call(name)
        except (ActorError, RuntimeError) as error:  # its SupervisionError is a RuntimeError
            raise Lost(f"Monarch has lost a process of the mesh: {' '.join(str(error).split())[:400]}") from error
        return values_of([json.loads(answer) for _, answer in answers.items()], None)

    async def stop(self) -> None:
        """End all processes."""
        if self._procs is not None:
            with suppress(*([Exception] if self._faults else [])):  # of a mesh that has lost one, some are gone
                await self._procs.stop()
        if self._before is not None:
            library.unhandled_fault_hook = self._before

"""Several processes: what one knows of the others of its run, and what they agree on beside arrays.

Arrays lie on the devices of all processes, and XLA sums over them; that is not here. Words go through the service by
which JAX's processes find each other, which process 0 keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from training_hub.backends import LISTEN_FD, RUN_ID
from training_hub.errors import LaunchError
from training_hub.recipe.comm import Comm

T = TypeVar("T")

SHORTEST_SECONDS = 10
"""A process is not taken for dead before this time without a sign of life."""


@dataclass(frozen=True)
class Group:
    """A process among those of its run; by itself, with nobody to talk to, as it is made.

    words: the service at which processes leave words for each other; name: what those of this run begin with.
    """

    rank: int = 0
    world_size: int = 1
    timeout_seconds: float = 600.0
    words: Any = None
    name: str = ""
    _turns: Iterator[int] = field(default_factory=count)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def gather(self, what: str, value: Any) -> list[Any]:
        """The values, plain JSON, of all processes in the order of their ranks.

        Raises LaunchError, naming those that are missing, where not all come within the time of comm.
        """
        if self.world_size == 1:
            return [value]
        turn = next(self._turns)
        place = f"{self.name}/{turn}/"
        try:
            self.words.key_value_set(f"{place}{self.rank:06d}", json.dumps(value))
            self.words.wait_at_barrier(f"{self.name}/barrier/{turn}", int(1000 * self.timeout_seconds))
            said = self.words.key_value_dir_get(place)
            if self.is_main and turn > 0:  # all have read what was said before, since they have come here
                self.words.key_value_delete(f"{self.name}/{turn - 1}/")
        except jax.errors.JaxRuntimeError as error:
            raise self._lost(what, self._missing(place), error) from error
        return [json.loads(value) for _, value in sorted(said)]

    def highest(self, what: str, numbers: Sequence[int]) -> list[int]:
        """Each number at its highest over all processes."""
        return [max(each) for each in zip(*self.gather(what, list(numbers)), strict=True)]

    def on_main(self, what: str, work: Callable[[], T]) -> T:
        """What `work`, done by process 0 alone, gives, as plain JSON; the others wait for as long as that is alive.

        Raises LaunchError in the others where it fails; process 0 raises its error.
        """
        if self.world_size == 1:
            return work()
        place = f"{self.name}/{next(self._turns)}/main"
        if not self.is_main:
            found: T = self._await(place, what)
            return found
        try:
            content: dict[str, Any] = {"found": (result := work())}
        except BaseException as error:
            self.words.key_value_set(place, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise
        self.words.key_value_set(place, json.dumps(content))
        return result

    def main_first(self, what: str, work: Callable[[], T]) -> T:
        """What `work` gives in this process; process 0 does it before the others, which then find what it left."""
        if self.world_size == 1:
            return work()
        found: list[T] = []
        self.on_main(what, lambda: found.append(work()))
        return found[0] if self.is_main else work()

    @contextmanager
    def kept(self, what: str) -> Iterator[None]:
        """Turn what XLA raises where others are gone into a LaunchError."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            # Neither has a type of its own: gloo names its source files, the service of words itself.
            if self.world_size == 1 or not any(sign in str(error) for sign in ("Gloo", "gloo", "NCCL", "oordination")):
                raise
            raise self._lost(what, "", error) from error

    def _await(self, place: str, what: str) -> Any:
        pause = 0.001
        while True:
            try:
                said = json.loads(self.words.key_value_try_get(place))
                break
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" not in str(error):
                    raise self._lost(what, "", error) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        if "error" in said:
            raise LaunchError(f"rank {self.rank} stops, since rank 0 failed at {what}: {said['error']}")
        return said["found"]

    def _missing(self, place: str) -> str:
        try:
            here = {int(key.rpartition("/")[2]) for key, _ in self.words.key_value_dir_get(place)}
        except jax.errors.JaxRuntimeError:
            return "rank 0, which keeps what the others say, does not answer"
        gone = [f"rank {rank}" for rank in range(self.world_size) if rank not in here]
        return f"{', '.join(gone)} did not come" if gone else "one of them came too late"

    def _lost(self, what: str, who: str, error: Exception) -> LaunchError:
        told = f"{who}; " if who else ""
        return LaunchError(
            f"rank {self.rank} of {self.world_size} waited for {what} and lost the others ({told}"
            f"{str(error).splitlines()[0]}). Look at the log of the one that is behind. One that is only slow needs "
            f"more than comm.timeout_seconds: {self.timeout_seconds:g}."
        )


ALONE = Group()


def whole(value: Any, is_kept: bool = True) -> np.ndarray:
    """All of an array, wherever it lies; where that is in several processes, all must call it, in the same order.

    is_kept: whether this process wants it; one that does not gets nothing.
    """
    if isinstance(value, Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        value = _everywhere(value.sharding.mesh)(value)
    return np.asarray(value) if is_kept else np.empty(0)


def placed(value: np.ndarray, sharding: Any) -> Array:
    """The array where it is to lie; each process, which has all of it, takes what its devices are to have."""
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


@cache
def _everywhere(grid: Any) -> Callable[[Array], Array]:
    return jax.jit(lambda value: value, out_shardings=NamedSharding(grid, PartitionSpec()))


@contextmanager
def joined(settings: Comm) -> Iterator[Group]:
    """This process among those that were started with it, by its environment (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT, as torchrun sets them).

    Raises LaunchError where the others do not come in time, or are of another run.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    rank = int(os.environ["RANK"])
    _meet(rank, world_size, settings)
    from jax._src.distributed import global_state  # JAX has no other way to its service of words
    from jax.experimental.multihost_utils import broadcast_one_to_all

    own = Group(rank, world_size, settings.timeout_seconds, global_state.client)
    with own.kept("the others at the start"):
        name = bytes(broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))).hex()
        group = Group(rank, world_size, settings.timeout_seconds, global_state.client, name)
        _refuse_strangers(group)
        yield group
        group.gather("the others at the end", "done")  # nobody leaves before all have read what they wait for


def refuse_differences(group: Group, facts: Mapping[str, Any]) -> None:
    """Raise LaunchError where the processes of a run are not alike in these."""
    told = group.gather("the others before the first step", dict(facts))
    found = [
        f"{name}: rank {rank} has {one[name]!r}, and rank 0 {told[0][name]!r}"
        for rank, one in enumerate(told)
        for name in facts
        if one[name] != told[0][name]
    ]
    if found:
        raise LaunchError([*found, "Give all processes the same files, versions and kind of machine."])


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """What tells these arrays from all others."""
    found = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return found.hexdigest()


def _refuse_strangers(group: Group) -> None:
    names = group.gather("the others at the start", os.environ.get(RUN_ID, ""))
    if len(set(names)) > 1:
        raise LaunchError(
            f"processes.rdzv_id: the processes that met are of different runs: {', '.join(map(repr, names))}. Give all "
            "nodes of one run the same rdzv_id, and each run an endpoint of its own."
        )


def _meet(rank: int, world_size: int, settings: Comm) -> None:
    """Let JAX's processes find each other, unless they have."""
    if jax.distributed.is_initialized():
        return
    address, bind = _meeting_place(rank)
    seconds = max(SHORTEST_SECONDS, int(settings.timeout_seconds))
    has_company = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            address,
            world_size,
            rank,
            # As torchrun's processes do, each of several on a node takes the GPU of its number.
            local_device_ids=[int(os.environ.get("LOCAL_RANK", "0"))] if has_company else None,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=seconds,
        )
    except RuntimeError as error:
        raise LaunchError(
            f"rank {rank} of {world_size} on {socket.gethostname()} found nobody at {address} within {seconds} s: "
            f"{str(error).splitlines()[0]}. Look whether process 0 runs, and whether processes.rdzv_endpoint "
            "(master_addr, master_port) names its node."
        ) from error
    if _is_loopback(address):
        _stay_on_loopback()


def _meeting_place(rank: int) -> tuple[str, str | None]:
    """Where the processes meet, and where process 0 is to listen."""
    own = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if own:
        return own, own if _is_loopback(own) else None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise LaunchError(
            "backend: jax cannot meet at MASTER_PORT, where torchrun itself listens. Start the run with "
            "processes.procs (nproc_per_node) in place of torchrun, or set JAX_COORDINATOR_ADDRESS to HOST:PORT of "
            "process 0, with a free port."
        )
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    listener = os.environ.get(LISTEN_FD)
    if rank == 0 and listener:
        # JAX's service opens a socket of its own: where the supervisor has held the place for it.
        with socket.socket(fileno=int(listener)) as held:
            host, port = held.getsockname()[:2]
        return address, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return address, address if _is_loopback(address) else None


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def _stay_on_loopback() -> None:
    """Let gloo, which sums on CPUs, listen where nobody else hears it: by itself it takes the name of this machine."""
    from jax._src.distributed import global_state
    from jax._src.lib import _jax
    from jax._src.xla_bridge import make_cpu_client
    from jax.extend.backend import register_backend_factory

    def on_loopback() -> Any:
        return make_cpu_client(_jax.make_gloo_tcp_collectives(global_state.client, hostname="127.0.0.1"))

    register_backend_factory("cpu", on_loopback, priority=0, fail_quietly=False)

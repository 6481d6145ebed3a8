"""Data parallelism: what a process knows of the others of its run, and all that they say to each other.

Every process holds the whole model and takes its share of each step's samples. Gradients and losses are summed once
per optimizer step, so that all move their weights by the same numbers; what writes files, process 0 does alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training_hub.backends import LISTEN_FD, RUN_ID
from training_hub.backends.torch_engine.patience import PatientStore
from training_hub.errors import LaunchError
from training_hub.recipe.comm import Comm

BUCKET_BYTES = 32 * 2**20
"""Small gradients travel together, up to this size; a larger one alone, without a copy."""

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """A process among those of its run; by itself, with nobody to talk to, as it is made.

    rank: its number, from 0. local_rank: its number on this node. store: where processes leave words for each other.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    timeout_seconds: float = 600.0
    store: Any = None
    _turns: Iterator[int] = field(default_factory=count)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def note(self, where: str) -> None:
        """Leave word of where this process is, for the error of those who would miss it."""
        if self.world_size > 1:
            with self.explained(where):
                self.store.set(f"at/{self.rank}", where)

    @torch.no_grad()
    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each; the tensor itself is changed."""
        if self.world_size > 1:
            with self.explained("a sum"):
                dist.all_reduce(numbers)
        return numbers

    def highest(self, numbers: Sequence[int], across: Sequence[Any] = (None,)) -> list[int]:
        """Each number at its highest over all processes, or over those of torch's groups `across`."""
        if self.world_size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)
        with self.explained("an agreement"):
            for one in across:
                dist.all_reduce(found, op=dist.ReduceOp.MAX, group=one)
        return [int(number) for number in found.tolist()]

    @torch.no_grad()
    def sum_gradients(self, weights: Iterable[Tensor], across: Sequence[Any] = (None,)) -> None:
        """Add up `grad` of each weight over all processes; what no process has a gradient of stays without.

        across: torch's groups of processes, one after the other, where not over all; all processes must call it.
        """
        if self.world_size == 1:
            return
        weights = list(weights)
        is_there = self.highest([int(weight.grad is not None) for weight in weights], across)
        moved = [weight for weight, there in zip(weights, is_there, strict=True) if there]
        for weight in moved:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        with self.explained("the sum of gradients"):
            for bucket in buckets([weight.grad for weight in moved if weight.grad is not None]):
                for one in across:
                    _sum_together(bucket, one)

    @torch.no_grad()
    def spread(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Overwrite the tensors with those of process `source`, bit for bit; all must call it with the same shapes."""
        if self.world_size == 1:
            return
        with self.explained(f"the weights of process {source}"):
            for tensor in _plain(tensors):
                if tensor.numel() == 0:
                    continue
                whole = tensor.detach().contiguous()
                dist.broadcast(whole.view(-1).view(torch.uint8), source)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    def gather(self, value: Any) -> list[Any]:
        """The values, plain JSON, of all processes in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        turn = next(self._turns)
        with self.explained("words of the others"):
            self.store.set(f"{turn}/{self.rank}", json.dumps(value))
            keys = [f"{turn}/{rank}" for rank in range(self.world_size)]
            self.store.wait(keys, timedelta(seconds=self.timeout_seconds))
            return [json.loads(self.store.get(key)) for key in keys]

    def each(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """What `work`, done by every process, gives in each, as plain JSON, in the order of their ranks; each waits for
        the others for as long as they are alive."""
        if self.world_size == 1:
            return [work()]
        turn = next(self._turns)
        with self._heard():
            found = work()
        with self.explained(what):
            self.store.set(f"{turn}/{self.rank}", json.dumps(found))
        return [self._await(f"{turn}/{rank}", rank, what) for rank in range(self.world_size)]

    def leave(self, key: str, value: Any) -> None:
        """Leave word, plain JSON, for those who ask for what all have `left`; nobody waits."""
        if self.world_size > 1:
            self.store.set(f"{key}/{self.rank}", json.dumps(value))

    def left(self, key: str) -> list[Any] | None:
        """What all processes left there, in the order of their ranks; None until all have."""
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        return [json.loads(self.store.get(key)) for key in keys] if self.store.check(keys) else None

    def on_main(self, what: str, work: Callable[[], T]) -> T:
        """What `work`, done by process 0 alone, gives, as plain JSON; the others wait for as long as that is alive.

        Raises LaunchError in the others where it fails; process 0 raises its error.
        """
        if self.world_size == 1:
            return work()
        turn = f"{next(self._turns)}/main"
        if not self.is_main:
            said = self._await(turn, 0, what)
            if "error" in said:
                raise LaunchError(f"rank {self.rank} stops, since rank 0 failed at {what}: {said['error']}")
            result: T = said["found"]
            return result
        with self._heard():
            try:
                found = work()
            except BaseException as error:
                with suppress(RuntimeError):  # the store may be what has gone
                    self.store.set(turn, json.dumps({"error": f"{type(error).__name__}: {error}"}))
                raise
        with self.explained(what):
            self.store.set(turn, json.dumps({"found": found}))
        return found

    def main_first(self, what: str, work: Callable[[], T]) -> T:
        """What `work` gives in this process; process 0 does it before the others, which then find what it left."""
        if self.world_size == 1:
            return work()
        found: list[T] = []
        self.on_main(what, lambda: found.append(work()))
        return found[0] if self.is_main else work()

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """While in the block, this process shows the others that it is alive."""
        over = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # the store is closed: the main thread is told by its own calls
                for number in count():
                    self.store.set(f"beat/{self.rank}", str(number))
                    if over.wait(min(1.0, self.timeout_seconds / 5)):
                        return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _await(self, turn: str, rank: int, what: str) -> Any:
        """What process `rank` leaves at `turn`."""
        beats = f"beat/{rank}"
        last, since, pause = b"", time.monotonic(), 0.001
        while True:
            with self.explained(what):
                if self.store.check([turn]):
                    break
                beat = self.store.get(beats) if self.store.check([beats]) else b""
            if beat != last:
                last, since = beat, time.monotonic()
            elif time.monotonic() - since > self.timeout_seconds:
                raise self._lost(what, f"no sign of life for {self.timeout_seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return json.loads(self.store.get(turn))

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn what torch raises where others are gone or silent into a LaunchError that says who was where."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(what, str(error).splitlines()[0]) from error

    @contextmanager
    def kept(self, what: str) -> Iterator[None]:
        """The same around work that is not only talk: of its errors those that say that others are gone or silent."""
        try:
            yield
        except RuntimeError as error:
            # gloo's errors have no type of their own, but name its source files.
            is_theirs = isinstance(error, dist.DistError) or "gloo" in str(error)
            if self.world_size == 1 or isinstance(error, LaunchError) or not is_theirs:
                raise
            raise self._lost(what, str(error).splitlines()[0]) from error

    def _lost(self, what: str, why: str) -> LaunchError:
        places = []
        for rank in range(self.world_size):
            try:
                place = self.store.get(f"at/{rank}").decode() if self.store.check([f"at/{rank}"]) else "its start"
            except RuntimeError:
                place = "a place that cannot be told, since rank 0 kept the list"
            places.append(f"rank {rank} was last at {place}")
        return LaunchError(
            f"rank {self.rank} of {self.world_size} waited for {what} and lost the others: {'; '.join(places)} "
            f"({why}). Look at the log of the one that is behind. One that is only slow needs more than "
            f"comm.timeout_seconds: {self.timeout_seconds:g}."
        )


ALONE = Group()


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors, and in the place of a library's own kind (a quantised weight) those that it is made of."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _plain(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def buckets(tensors: Sequence[Tensor], most_bytes: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of one format and at most `most_bytes`; a larger one is a group of its own."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if bucket and (size + own > most_bytes or tensor.dtype != bucket[0].dtype or tensor.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += own
    if bucket:
        yield bucket


def _sum_together(bucket: Sequence[Tensor], group: Any = None) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0], group=group)
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in bucket])
    torch._foreach_copy_(list(bucket), [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])


def shared_out(costs: Mapping[str, float], num_shares: int) -> list[list[str]]:
    """The names in `num_shares` lists of about the same cost: the dearest first, each to the list with the least yet.

    No list costs more than 4/3 of what the dearest list of the best division does. Source: Graham 1969, Bounds on
    multiprocessing timing anomalies.
    """
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    loads = [0.0] * num_shares
    for name in sorted(costs, key=lambda one: -costs[one]):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += costs[name]
    return shares


@contextmanager
def joined(settings: Comm) -> Iterator[Group]:
    """This process among those that were started with it, by its environment (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT, as torchrun sets them); the group is taken apart at the end.

    gloo between CPUs, nccl between GPUs. Raises LaunchError where the others do not come in time.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = _take_gpu(local_rank)
    limit = timedelta(seconds=settings.timeout_seconds)
    store = _meet(rank, world_size, limit)
    words = PatientStore(dist.PrefixStore("training_hub", store), settings.timeout_seconds)
    group = Group(rank, local_rank, world_size, settings.timeout_seconds, words)
    refuse_strangers(group)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
        )
    except RuntimeError as error:
        raise group._lost("the others at the start", str(error).splitlines()[0]) from error
    is_whole = False
    try:
        yield group
        group.gather("done")  # nobody leaves before all have read what they wait for
        is_whole = True
    finally:
        if is_whole or not has_gpu:  # nccl would wait here for those that are gone
            dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Let a later run in this process not get DTensors on meshes of this one, whose groups are gone: torch remembers
    how operations divide their results together with the mesh, and takes an equal one for the same."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def refuse_strangers(group: Group) -> None:
    """Raise LaunchError where a process of another run has come to this one's meeting place."""
    names = group.gather(os.environ.get(RUN_ID, ""))
    if len(set(names)) > 1:
        raise LaunchError(
            f"processes.rdzv_id: the processes that met are of different runs: {', '.join(map(repr, names))}. Give all "
            "nodes of one run the same rdzv_id, and each run an endpoint of its own."
        )


def _take_gpu(local_rank: int) -> bool:
    if not torch.cuda.is_available():
        return False
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise LaunchError(
            f"processes.procs: process {local_rank} of this node has no GPU of its own; there are {there}. Write "
            f"processes.procs: {there}."
        )
    torch.cuda.set_device(local_rank)
    return True


def _meet(rank: int, world_size: int, limit: timedelta) -> Any:
    """The store at which the processes meet: one that torchrun keeps, or that of process 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listener = os.environ.get(LISTEN_FD)
    is_server = rank == 0 and not is_kept
    own = int(listener) if is_server and listener else None
    try:
        store = dist.TCPStore(
            host, port, world_size, is_server, limit, wait_for_workers=False, multi_tenant=False, master_listen_fd=own
        )
    except RuntimeError as error:
        raise LaunchError(
            f"rank {rank} of {world_size} on {socket.gethostname()} found nobody at {host}:{port} within "
            f"{limit.total_seconds():g} s: {str(error).splitlines()[0]}. Look whether process 0 runs, and whether "
            "processes.rdzv_endpoint (master_addr, master_port) names its node."
        ) from error
    kept = dist.PrefixStore(f"run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    turn = kept.add(f"joined/{rank}", 1)  # one that torchrun keeps has the words of groups that came before
    return dist.PrefixStore(str(turn), kept)

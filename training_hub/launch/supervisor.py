"""The processes of this node: started, listened to, told of signals, and ended together.

torch has an agent for this (torch.distributed.elastic). It listens on every interface of the machine, kills what has
not ended 30 seconds after a signal, and leaves workers alive when it is killed itself; so the agent is ours. Under
torchrun's own a run works as well (launch.layout).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, TextIO

from training_hub.backends import HEARS_TWICE, LISTEN_FD, RUN_ID
from training_hub.data.workers import num_cores
from training_hub.errors import LaunchError
from training_hub.launch.endings import Ending, ending_of, error_of, log_of, read_ending
from training_hub.launch.layout import Layout
from training_hub.launch.stopping import WATCHED
from training_hub.recipe.folder import RunFolder

WORKER = "training_hub.launch.worker"
PARENT = "TRAINING_HUB_PARENT"
"""Environment: the process without which a worker has no business to live."""

GRACE_SECONDS = 5.0
"""How long the others may take to find out by themselves that one is gone."""
STACKS_SECONDS = 10.0
"""How long processes may take to write down where they hang."""
QUIET_SECONDS = 0.3
"""How long a log must stand still to have all of that."""
LOOK_SECONDS = 0.05
PATIENCE = 2
"""Signals that are passed on; one more kills."""


@dataclass(frozen=True)
class Task:
    """What processes are started for: the module that each runs, with a file that says the rest. remedy: what to do
    where one is lost; without it, what there is to go on from. stream: where the first one speaks; None: standard
    output."""

    file: Path
    module: str = WORKER
    remedy: str = ""
    stream: TextIO | None = None


@dataclass
class Worker:
    """A process of the run. is_stuck: it did not end by itself when another had."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    ended_at: float | None = None
    is_stuck: bool = False


@dataclass
class Crew:
    """The processes of this node, and the signals that were passed on to them."""

    workers: list[Worker] = field(default_factory=list)
    num_signals: int = 0

    def alive(self) -> list[Worker]:
        for one in self.workers:
            if one.ended_at is None and one.process.poll() is not None:
                one.ended_at = time.time()
        return [one for one in self.workers if one.ended_at is None]

    def note(self, number: int, frame: FrameType | None) -> None:
        self.num_signals += 1
        self.send(number if self.num_signals <= PATIENCE else signal.SIGKILL)

    def send(self, number: int) -> None:
        for one in self.alive():
            with suppress(ProcessLookupError):
                one.process.send_signal(number)


def supervise(layout: Layout, task: Task, folder: RunFolder) -> dict[str, Any]:
    """Do the task in this node's processes of `layout`, and give the result of the first, as plain JSON.

    Raises the error of the process that failed first, of its own type, with its rank and log; LaunchError for one that
    was killed or hung. None of the processes outlives this call, or this process.
    """
    ranks = range(layout.node_rank * layout.procs, (layout.node_rank + 1) * layout.procs)
    log_of(folder.path, 0).parent.mkdir(parents=True, exist_ok=True)
    for rank in ranks:
        ending_of(folder.path, rank).unlink(missing_ok=True)
    crew = Crew()
    with forwarding(crew), ended_with(crew):
        with meeting_place(layout) as (port, listener):
            for rank in ranks:
                crew.workers.append(start(layout, rank, port, listener if rank == 0 else None, task, folder))
        watch(crew)
    failed = [one for one in crew.workers if one.process.returncode]
    if failed:
        raise cause(crew.workers, layout, folder.path, task.remedy)
    ending = read_ending(folder.path, ranks[0])
    if ending is None or ending.result is None:
        raise LaunchError(f"rank {ranks[0]} ended without a result; its log: {log_of(folder.path, ranks[0])}")
    return ending.result


@contextmanager
def forwarding(crew: Crew) -> Iterator[None]:
    """Within, SIGTERM and SIGINT go to the workers, which save and end; afterwards they do what they did before."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: handler for number in WATCHED if is_main and (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, crew.note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ended_with(crew: Crew) -> Iterator[None]:
    """However the block ends, no worker is left."""
    try:
        yield
    finally:
        crew.send(signal.SIGKILL)
        for one in crew.workers:
            one.process.wait()


@contextmanager
def meeting_place(layout: Layout) -> Iterator[tuple[int, socket.socket | None]]:
    """Port and, on the first node, the socket at which rank 0 will answer; it listens to loopback where that does.

    Raises LaunchError where the port is taken.
    """
    if layout.node_rank > 0:
        yield layout.port, None
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(layout.host, layout.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise LaunchError(
            f"processes.rdzv_endpoint: {layout.host}: {error}. Name a host that is known here."
        ) from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A node's own name may lead to its loopback in its own table of hosts, where the other nodes are not heard.
        is_hidden = layout.nodes > 1 and str(address[0]).startswith("127.") and not layout.is_on_loopback
        try:
            listener.bind(("", layout.port) if is_hidden else address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or layout.nodes == 1:
                raise LaunchError(
                    f"processes.rdzv_endpoint: {layout.host}:{layout.port} cannot be listened at: {error}. Name "
                    "another port, or end what uses it."
                ) from error
            listener.bind(("", layout.port))  # the first node is behind an address that is not its own
        listener.listen(socket.SOMAXCONN)
        yield listener.getsockname()[1], listener


def start(
    layout: Layout, rank: int, port: int, listener: socket.socket | None, task: Task, folder: RunFolder
) -> Worker:
    """Start one process; what it writes goes to its log, and what rank 0 says to the task's stream as well."""
    environment = environment_of(layout, rank, port, os.environ)
    if listener is not None:
        environment[LISTEN_FD] = str(listener.fileno())
    with log_of(folder.path, rank).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", task.module, str(task.file)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else log,
            stderr=log,
            pass_fds=[listener.fileno()] if listener is not None else [],
            start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
        )
    if process.stdout is not None:
        told = (process.stdout, log_of(folder.path, rank), task.stream)
        threading.Thread(target=tell, args=told, daemon=True).start()
    return Worker(rank, process, log_of(folder.path, rank))


def environment_of(layout: Layout, rank: int, port: int, own: Mapping[str, str]) -> dict[str, str]:
    """What a worker is told: torchrun's variables, and to keep to itself what concerns this machine alone."""
    local_rank = rank - layout.node_rank * layout.procs
    found = {
        **own,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_WORLD_SIZE": str(layout.procs),
        "GROUP_RANK": str(layout.node_rank),
        "MASTER_ADDR": layout.host,
        "MASTER_PORT": str(port),
        RUN_ID: layout.run_id,
        PARENT: str(os.getpid()),
        "PYTHONPATH": python_path(own.get("PYTHONPATH")),
    }
    if "SLURM_JOB_ID" in own:  # Slurm signals every process of a job step, those that we started as well
        found[HEARS_TWICE] = "1"
    # As many threads in all as there are cores; more would take turns.
    found.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // layout.procs)))
    if layout.is_on_loopback:
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
            found.setdefault(variable, str(loopback))
    return found


def python_path(own: str | None) -> str:
    """PYTHONPATH with which a worker finds this package, wherever it lies."""
    root = Path(__file__).parents[2]
    mine = [] if root.name in ("site-packages", "dist-packages") else [str(root)]
    return os.pathsep.join([*mine, *([own] if own else [])])


def tell(output: IO[bytes], log: Path, stream: TextIO | None = None) -> None:
    """Write what rank 0 says to its log and to the stream, standard output where there is none, until it ends."""
    with output, log.open("ab", buffering=0) as file:
        for line in output:
            file.write(line)
            with suppress(OSError, ValueError):  # nobody listens any more: the log has it
                spoken = stream or sys.stdout
                spoken.write(line.decode("utf-8", "replace"))
                spoken.flush()


def watch(crew: Crew) -> None:
    """Wait for all to end. Where one has failed and others do not, let these write down where they hang, and kill."""
    failed_at = None
    while alive := crew.alive():
        if failed_at is None and any(one.process.returncode for one in crew.workers):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            for one in alive:
                one.is_stuck = True
            if hasattr(signal, "SIGUSR1"):
                let_write_stacks(crew)
            crew.send(signal.SIGKILL)
            return
        time.sleep(LOOK_SECONDS)


def let_write_stacks(crew: Crew) -> None:
    """Ask those that hang for their stacks, and wait until their logs have grown by these."""
    before = found = _log_sizes(crew)
    began = since = time.monotonic()
    crew.send(signal.SIGUSR1)
    crew.send(signal.SIGCONT)  # one that was stopped can write only then
    while (now := time.monotonic()) - began < STACKS_SECONDS:
        sizes = _log_sizes(crew)
        if sizes != found:
            found, since = sizes, now
        elif now - since > QUIET_SECONDS and all(size > before[rank] for rank, size in sizes.items()):
            return
        time.sleep(LOOK_SECONDS)


def _log_sizes(crew: Crew) -> dict[int, int]:
    """Rank -> bytes in the log, of those that live."""
    return {one.rank: one.log.stat().st_size for one in crew.alive()}


def cause(workers: Sequence[Worker], layout: Layout, folder: Path, remedy: str = "") -> Exception:
    """What ended the run: the first error that a worker raised of its own, else one that was killed, else a hang."""
    endings = [ending for one in workers if (ending := read_ending(folder, one.rank)) is not None and ending.type]
    own = sorted((one for one in endings if not one.is_echo), key=lambda one: one.time)
    if own:
        return error_of(own[0], f"(rank {own[0].rank} of {layout.world_size}; its log: {log_of(folder, own[0].rank)})")
    said = {ending.rank for ending in endings}
    lines = [
        f"rank {one.rank} of {layout.world_size} {how(one)}; its log: {log_of(folder, one.rank)}"
        for one in sorted(workers, key=lambda one: (one.is_stuck, one.ended_at or 0))
        if one.is_stuck or (one.rank not in said and one.process.returncode)
    ]
    return LaunchError([*lines, *echoes(endings), remedy or _going_on(folder)])


def echoes(endings: Sequence[Ending]) -> list[str]:
    """What those said that lost the others, the first of them."""
    first = sorted(endings, key=lambda one: one.time)[:1]
    return [problem for ending in first for problem in ending.problems]


def how(worker: Worker) -> str:
    """How a worker ended that left no word."""
    code = worker.process.returncode
    if worker.is_stuck:
        return (
            f"(process {worker.process.pid}) did not end when another had failed, and was killed; it hung where the "
            "stacks in its log say"
        )
    if code < 0:
        name = signal.Signals(-code).name
        more = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"(process {worker.process.pid}) was killed by {name}{more}"
    return f"(process {worker.process.pid}) ended with code {code} and said nothing"


def _going_on(folder: Path) -> str:
    newest = RunFolder(folder).newest_checkpoint()
    kept = f"the newest checkpoint is {newest}" if newest else "no checkpoint had been written"
    return f"{kept[0].upper()}{kept[1:]}. Run the same command again to go on from there."

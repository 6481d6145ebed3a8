"""A real Slurm of two nodes on this machine, from Debian's slurm-wlm and munge, in a folder of its own.

Controller, two slurmd and munge run from that folder; nothing of the system's own configuration is read or changed. The
nodes are called n1 and n2; where that can be done without changing the system (a mount namespace with its own
/etc/hosts), these names lead to two loopback addresses, as they lead to two machines on a cluster.

`python -m tests.slurm.cluster FOLDER` keeps one until it is interrupted, and says how to use it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.ports import free_port

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "munged", "mungekey", "unshare")
NODES = {"n1": "127.0.0.11", "n2": "127.0.0.12"}

CONF = """
ClusterName=training
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
# A job that was requeued may not begin before its old credentials are worth nothing: two minutes, if not told.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=20
InactiveLimit=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{nodes}
PartitionName=normal Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 DefaultTime=10 MaxTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF DefaultTime=10 MaxTime=60
"""


def missing() -> list[str]:
    """Programs that are not installed here; /usr/sbin, where Debian puts daemons, is looked at as well."""
    return [name for name in NEEDED if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """Slurm with two nodes, up from `start` to `stop`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What tells Slurm's commands of this cluster and not of another."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": search_path()}

    def start(self) -> None:
        self._write()
        self._munge()
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.until(lambda: self.states() == ["idle", "idle"], "nodes to be idle")

    def states(self) -> list[str]:
        """How each node stands."""
        return self.ask("sinfo", "--Node", "--noheader", "--partition=normal", "--format=%T").split()

    def stop(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self.ask("scancel", f"--user={getpass.getuser()}")
            self.until(lambda: not self.ask("squeue", "--noheader"), "jobs to end", 60)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *words: str) -> str:
        """What a command of Slurm's answers."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Wait until it holds; the end of the logs where it does not come to that."""
        end = time.monotonic() + seconds
        while True:
            with suppress(subprocess.CalledProcessError):
                if holds():
                    return
            if time.monotonic() > end:
                logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.log"))
                raise TimeoutError(f"waited {seconds:g} s for {what}\n{logs}")
            time.sleep(0.2)

    def _write(self) -> None:
        (self.folder / "munge").mkdir(parents=True)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        # SelectTypeParameters=CR_Core gives a node's one core to one job, so that a second job waits or preempts.
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr={address} Port={free_port()} CPUs=1 "
            "RealMemory=1000 State=UNKNOWN"
            for name, address in NODES.items()
        )
        text = CONF.format(user=getpass.getuser(), controller=free_port(), folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        names = "".join(f"{address} {name}\n" for name, address in NODES.items())
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _munge(self) -> None:
        place = self.folder / "munge"
        subprocess.run(["mungekey", "--create", f"--keyfile={place}/key"], env=self._everything(), check=True)
        files = [f"--{what}={place}/{name}" for what, name in MUNGE_FILES.items()]
        self._daemon("munged", "--foreground", "--force", *files)
        self.until(lambda: (place / "socket").exists(), "munge")

    def _daemon(self, *words: str) -> None:
        # In a mount namespace of its own /etc/hosts has the names of the nodes; jobs inherit it.
        program = 'mount --bind "$0" /etc/hosts && exec "$@"'
        own = [] if os.geteuid() == 0 else ["--map-current-user", "--user"]
        namespace = ["unshare", *own, "--mount", "sh", "-c", program, str(self.folder / "hosts")]
        with (self.folder / f"{words[0]}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    [*namespace, *words], env=self._everything(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            )

    def _everything(self) -> dict[str, str]:
        # What a job inherits from slurmd is little; what it inherits from sbatch is the caller's.
        return {**os.environ, **self.environment}


MUNGE_FILES = {
    "socket": "socket",
    "key-file": "key",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def main() -> None:
    if absent := missing():
        raise SystemExit(f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)")
    cluster = Cluster(Path(sys.argv[1]).resolve())
    cluster.start()
    print(f"two nodes are idle. Use them: export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        signal.pause()
    cluster.stop()


if __name__ == "__main__":
    main()

"""Processes that train together, kept for many runs: what torchrun would start anew for each."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.invariants.run import recipe


class Crew:
    """`world_size` processes that wait for runs."""

    def __init__(self, world_size: int, log: Path):
        self._log = log.open("w")
        self._members = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.member", str(rank), str(world_size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            for rank in range(world_size)
        ]

    def close(self) -> None:
        for member in self._members:
            assert member.stdin is not None and member.stdout is not None
            member.stdin.close()
            member.wait(timeout=30)
            member.stdout.close()
        self._log.close()

    def train(self, model: Path, data: Path | list[Path], output: Path, /, order: Any = None, **sections: Any) -> Any:
        """What each rank's run came to; `data` may be another for each rank."""
        each = data if isinstance(data, list) else [data] * len(self._members)
        recipes = [recipe(model, one, output, **sections).model_dump(mode="json") for one in each]
        line = json.dumps({"recipes": recipes, "port": free_port(), **(order or {})})
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write(line + "\n")
            member.stdin.flush()
        return [json.loads(member.stdout.readline()) for member in self._members if member.stdout is not None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Processes are started, listened to and ended together; by an engine that takes no time, so that only this is seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.moments import PATIENCE_SECONDS, until
from tests.ports import free_port
from training_hub.backends import Given
from training_hub.errors import DataError, Interrupted, LaunchError, RecipeError
from training_hub.launch import run
from training_hub.launch.layout import Layout
from training_hub.launch.supervisor import meeting_place
from training_hub.recipe import Recipe

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as on Unix")

# What each rank does is written in model.path; the folder of the run shows which processes there are.
ENGINE = """
import os, signal, sys, time
from pathlib import Path

from training_hub.errors import DataError, Interrupted, LaunchError
from training_hub.types import TrainResult
from training_hub.backends.shared.signals import StopRequest


def until_other(output, state):
    # Return once the other process of two is in one of these states (proc(5)), or gone.
    while not (other := (output / f"pid{1 - int(os.environ['RANK'])}").read_text()):
        time.sleep(0.01)
    try:
        while Path("/proc", other, "stat").read_text().rpartition(")")[2].split()[0] not in state:
            time.sleep(0.01)
    except (FileNotFoundError, ProcessLookupError):
        return


class Several:
    name = "several"

    def objections(self, recipe):
        return []

    def num_devices(self):
        return 2

    def train(self, recipe, given):
        rank, output = int(os.environ["RANK"]), Path(recipe.output)
        (output / f"pid{rank}").write_text(str(os.getpid()))
        print(f"rank {rank} is here", flush=True)
        print(f"rank {rank} whispers", file=sys.stderr, flush=True)
        while not all((output / f"pid{one}").exists() for one in range(int(os.environ["WORLD_SIZE"]))):
            time.sleep(0.01)
        with StopRequest() as stop:
            (output / f"hears{rank}").touch()
            exec(recipe.model.path, {**globals(), **locals()})
        world_size = float(os.environ["WORLD_SIZE"])
        return TrainResult("finished", output, None, metrics={"world": world_size}, engine="several")
"""

WAIT = "while stop.number is None: time.sleep(0.01)\nraise Interrupted('saved. Go on.', stop.number)"
LOST = "raise LaunchError('lost the others: rank 1 was last at step 7')"
LOST_AFTER = f"until_other(output, 'ZX'); {LOST}"
"""What is said by a process once the other has ended."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine, installed as any engine from elsewhere, here and in the processes that are started."""
    folder = tmp_path / "site"
    information = folder / "hub_several-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "hub_several.py").write_text(ENGINE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hub-several\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[training_hub.backends]\nseveral = hub_several:Several\n")
    monkeypatch.syspath_prepend(folder)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), root]))
    monkeypatch.setattr("training_hub.launch.supervisor.GRACE_SECONDS", PATIENCE_SECONDS)
    yield
    sys.modules.pop("hub_several", None)


@pytest.fixture
def asked(site: None, tmp_path: Path) -> Callable[..., Recipe]:
    def recipe(script: str, **processes: Any) -> Recipe:
        sections = {"model": {"path": script}, "monitoring": {"console": "plain"}, "backend": "several"}
        processes = {"procs": 2, **processes}
        return Recipe.model_validate({**sections, "output": str(tmp_path / "run"), "processes": processes})

    return recipe


def log(tmp_path: Path, rank: int) -> str:
    return (tmp_path / "run" / "logs" / f"rank{rank}.log").read_text()


def is_alive(tmp_path: Path, rank: int) -> bool:
    try:
        os.kill(int((tmp_path / "run" / f"pid{rank}").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_all_ranks_run_and_the_first_speaks(asked, tmp_path, capsys):
    result = run(asked("pass", procs="gpu"))
    assert (result.status, result.metrics) == ("finished", {"world": 2.0})
    assert "rank 0 is here" in (said := capsys.readouterr().out) and "rank 1" not in said and "whispers" not in said
    for rank in (0, 1):
        assert f"rank {rank} is here" in log(tmp_path, rank) and f"rank {rank} whispers" in log(tmp_path, rank)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    assert run(asked("pass")).status == "already finished"


def test_the_error_of_a_worker_is_the_error_of_the_call(asked, tmp_path):
    with pytest.raises(DataError) as caught:
        run(asked(f"if rank == 1: raise DataError(['row 3: no.', 'row 4: no.'])\n{LOST_AFTER}"))
    assert caught.value.problems[0] == "row 3: no."
    assert caught.value.problems[1] == f"row 4: no. (rank 1 of 2; its log: {tmp_path / 'run' / 'logs' / 'rank1.log'})"
    assert "Traceback" in log(tmp_path, 1)
    said = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (said["status"], said["error"], said["exit_code"]) == ("failed", "DataError", DataError.exit_code)


def test_an_error_of_pythons_own_keeps_its_type(asked):
    with pytest.raises(ZeroDivisionError, match=r"division by zero \(rank 0 of 2"):
        run(asked("1 / 0 if rank == 0 else until_other(output, 'ZX')"))


def test_a_rank_that_is_killed_is_named_with_what_the_others_know(asked, tmp_path):
    with pytest.raises(LaunchError) as caught:
        run(asked(f"if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n{LOST_AFTER}"))
    first, second, third = caught.value.problems
    assert "rank 1 of 2" in first and "was killed by SIGKILL" in first and "rank1.log" in first
    assert second == "lost the others: rank 1 was last at step 7"
    assert "No checkpoint had been written" in third
    assert "Current thread" in log(tmp_path, 0), "where it waited when it lost the other"


def test_a_rank_that_hangs_writes_its_stacks_and_is_ended(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("training_hub.launch.supervisor.GRACE_SECONDS", 0.3)
    script = f"if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\nuntil_other(output, 'T')\n{LOST}"
    with pytest.raises(LaunchError, match=r"rank 1 of 2 .* did not end when another had failed, and was killed"):
        run(asked(script))
    assert "hub_several.py" in log(tmp_path, 1) and "Current thread" in log(tmp_path, 1)
    assert not is_alive(tmp_path, 1)


def starter(asked: Callable[..., Recipe], script: str, tmp_path: Path) -> subprocess.Popen[str]:
    """A process that runs the recipe in two others; returns once these hear signals."""
    from training_hub.recipe.load import dump

    (tmp_path / "asked.yaml").write_text(dump(asked(script)))
    program = f"""
        from pathlib import Path
        from training_hub.errors import Interrupted
        from training_hub.launch import run
        from training_hub.recipe.load import load_file
        try:
            run(load_file(Path({str(tmp_path / "asked.yaml")!r})))
        except Interrupted as error:
            print(error)
            raise SystemExit(error.exit_code)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    until(lambda: all((tmp_path / "run" / f"hears{rank}").exists() for rank in (0, 1)))
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(number: int, asked, tmp_path):
    process = starter(asked, WAIT, tmp_path)
    process.send_signal(number)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + number
    assert "saved. Go on." in said
    assert not is_alive(tmp_path, 0) and not is_alive(tmp_path, 1)


def test_nothing_outlives_a_caller_that_is_killed(asked, tmp_path):
    process = starter(asked, "time.sleep(600)", tmp_path)
    process.kill()
    process.wait()
    until(lambda: not is_alive(tmp_path, 0) and not is_alive(tmp_path, 1))
    assert process.stdout is not None
    process.stdout.close()


def test_one_rank_that_is_signalled_ends_the_run_as_interrupted(asked, tmp_path):
    with pytest.raises(Interrupted, match=r"saved\. Go on\."):
        run(asked(f"if rank == 0: {LOST_AFTER}\nos.kill(os.getpid(), signal.SIGTERM)\n{WAIT}"))


def test_two_nodes_meet_where_they_were_told(asked, tmp_path):
    """Each node is a call; here both on this machine, the second in a process of its own."""
    place = {"procs": 1, "nodes": 2, "rdzv_endpoint": f"127.0.0.1:{free_port()}"}
    second = starter_of_node(asked("pass", **place, node_rank=1), tmp_path)
    result = run(asked("pass", **place, node_rank=0))
    said, _ = second.communicate(timeout=PATIENCE_SECONDS)
    assert (result.metrics["world"], said.strip()) == (2.0, "finished 2.0")


def starter_of_node(recipe: Recipe, tmp_path: Path) -> subprocess.Popen[str]:
    from training_hub.recipe.load import dump

    (tmp_path / "node1.yaml").write_text(dump(recipe))
    program = f"""
        from pathlib import Path
        from training_hub.launch import run
        from training_hub.recipe.load import load_file
        result = run(load_file(Path({str(tmp_path / "node1.yaml")!r})))
        print(result.status, result.metrics["world"])
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)


def test_on_one_node_nobody_else_can_listen():
    with meeting_place(Layout(2)) as (port, listener):
        assert listener is not None and listener.getsockname() == ("127.0.0.1", port)


def test_a_port_that_is_taken_is_said_before_anything_is_started():
    with (
        meeting_place(Layout()) as (port, _),
        pytest.raises(LaunchError, match=f"127.0.0.1:{port} cannot be listened"),
        meeting_place(Layout(2, port=port)),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "live"), [("model", {"model": object()}), ("rows", {"rows": [{}]}), ("callbacks", {"watchers": (print,)})]
)
def test_live_objects_cannot_travel(name: str, live: dict[str, Any], asked, tmp_path):
    with pytest.raises(RecipeError, match=rf"{name}: a live object stays in this process.*torchrun"):
        run(asked("pass"), Given(**live))
    assert not (tmp_path / "run").exists()

"""The batch script says what was asked, in words that bash and sbatch read back as they were meant.

That Slurm reads it so is shown by tests/slurm, on a real one.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training_hub.errors import RecipeError
from training_hub.launch.resources import Resources, sent_recipe
from training_hub.launch.slurm.job import Job, refuse_wrong
from training_hub.launch.slurm.script import batch_script, quoted
from training_hub.recipe import Recipe
from training_hub.recipe.load import load

PLACES = ["/runs/one", "/runs/my model's", '/runs/"quoted" $(touch x) `y` ; # z', "/runs/größe 50%"]


def recipe(output: str = "out", **sections: Any) -> Recipe:
    return Recipe.model_validate({"output": output, "model": {"path": "m"}, "data": {"path": "d"}, **sections})


def script(job: Job, place: str = "/runs/one") -> str:
    return batch_script(recipe(place), job, Path(place) / "slurm", Path("/home/u s er"))


def directives(text: str) -> dict[str, str]:
    """Options as sbatch takes them: a word, or one in double quotes where a backslash gives the next character."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r'#SBATCH --([\w-]+)(?:=(?:"((?:\\.|[^"\\])*)"|([^\s"#\'\\]*)))?$', line):
            found[match[1]] = re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3] or ""
    return found


def task(text: str) -> list[str]:
    """The words of the line that starts the tasks, as bash takes them."""
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    assert line.endswith(" &")
    return shlex.split(line.removesuffix("&"))


def test_all_that_is_asked_stands_in_the_head():
    resources = Resources(4, 8, gpus_per_node=8, cpus_per_node=64, memory="200G")
    job = Job(
        resources, "sft", "team", "gpu", "high", "8:00:00", "TERM@300", options=("--exclusive", "--constraint=a|b")
    )
    found = directives(script(job))
    wanted = {
        "job-name": "sft",
        "account": "team",
        "partition": "gpu",
        "qos": "high",
        "time": "8:00:00",
        "nodes": "4",
        "ntasks-per-node": "1",
        "cpus-per-task": "64",
        "gpus-per-node": "8",
        "mem": "200G",
        "signal": "TERM@300",
        "requeue": "",
        "exclusive": "",
        "constraint": "a|b",
        "chdir": "/home/u s er",
        "output": "/runs/one/slurm/job-%j.log",
        "open-mode": "append",
    }
    assert found == wanted


def test_what_is_not_asked_is_left_to_the_cluster():
    found = directives(script(Job()))
    assert {"account", "partition", "qos", "time", "mem", "cpus-per-task", "gpus-per-node"}.isdisjoint(found)


@pytest.mark.parametrize("place", PLACES)
def test_a_path_of_any_name_is_one_word_to_bash_and_to_sbatch(place: str):
    text = script(Job(name='it\'s "mine" #1'), place)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    run = [sys.executable, "-m", "training_hub", "sft", "--config", f"{place}/slurm/recipe.yaml"]
    assert task(text)[-6:] == run
    found = directives(text)
    assert found["output"] == f"{place.replace('%', '%%')}/slurm/job-%j.log"
    assert found["job-name"] == 'it\'s "mine" #1'


def test_a_path_that_sbatch_would_read_otherwise_is_refused():
    for place in ("/runs/back\\slash", "/runs/two\nlines"):
        with pytest.raises(RecipeError, match="output"):
            script(Job(), place)


def test_quoting_leaves_plain_words_alone():
    assert quoted("/a/b-c_d.e:f=g,h") == "/a/b-c_d.e:f=g,h"
    assert quoted("a b'c") == '"a b\'c"'
    assert quoted('a"b') == '"a\\"b"'


def test_each_node_gets_one_task_with_all_that_the_node_has():
    words = task(script(Job(Resources(2, 8, gpus_per_node=8, cpus_per_node=64))))
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64", "--gpus-per-node=8"} <= set(words)


def test_a_container_is_one_of_pyxis_or_a_file_of_apptainer():
    pyxis = task(script(Job(Resources(container="nvcr.io/a:1"), container_mounts="/data:/data")))
    assert {"--container-image=nvcr.io/a:1", "--container-mounts=/data:/data"} <= set(pyxis)
    apptainer = task(script(Job(Resources(gpus_per_node=1, container="/i/a b.sif"), container_mounts="/d:/d")))
    start = apptainer.index("apptainer")
    assert apptainer[start : start + 7] == ["apptainer", "exec", "--nv", "--bind", "/d:/d", "/i/a b.sif", "python3"]
    assert "PYTHONPATH" not in script(Job(Resources(container="a"))), "the package in the image is the one that runs"


def test_the_job_is_started_again_only_where_that_is_wanted():
    assert "scontrol requeue" in script(Job()) and "no-requeue" not in script(Job())
    assert "scontrol requeue" not in (once := script(Job(is_requeued=False))) and "--no-requeue" in once


def test_nothing_of_the_environment_is_written_down(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "canary-1")
    monkeypatch.setenv("WANDB_API_KEY", "canary-2")
    monkeypatch.setenv("PYTHONPATH", "/canary-3")
    assert "canary" not in script(Job())


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Job(Resources(nodes=0)), "--nodes: found 0; allowed: a whole number of at least 1"),
        (Job(Resources(procs=8, gpus_per_node=4)), "Write --procs-per-node 4"),
        (Job(signal="USR1@60"), "--signal: found 'USR1@60'"),
        (Job(signal="B:TERM@60"), "B:USR1@SECONDS"),
        (Job(options=("--nodes=3",)), "--sbatch --nodes=3: write --nodes instead"),
        (Job(options=("-N3",)), "--sbatch -N3: write --nodes instead"),
        (Job(options=("--output=x",)), "the run sets this itself"),
        (Job(options=("exclusive",)), "allowed: an option of sbatch"),
        (Job(options=("--comment=a\nsbatch x",)), "allowed: one line"),
        (Job(account=""), "--account: found ''"),
        (Job(partition="a\n#SBATCH --uid=0"), "--partition: found"),
        (Job(container_mounts="/a:/a"), "--container-mounts: found without a container"),
    ],
)
def test_what_slurm_could_not_do_with_is_refused(job: Job, said: str):
    with pytest.raises(RecipeError) as caught:
        refuse_wrong(job)
    assert said in str(caught.value)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        refuse_wrong(Job(Resources(nodes=0), signal="x", options=("y",)))
    assert len(caught.value.problems) == 3


def test_the_recipe_that_is_sent_leaves_to_each_node_which_it_is():
    whole = recipe(processes={"rdzv_endpoint": "a:1", "node_rank": 0}, checkpoint={"resume": "restart"})
    sent = load(sent_recipe(whole, Resources(2, 4)))
    assert (sent.processes.procs, sent.processes.nodes) == (4, 2)
    assert sent.processes.model_fields_set == {"procs", "nodes"}
    assert sent.checkpoint.resume == "auto", "started again, it must go on"
    unchanged = {"processes", "checkpoint"}
    assert sent.model_dump(exclude=unchanged) == whole.model_dump(exclude=unchanged)

"""A task of srun knows from Slurm's variables which node it is and where the nodes meet."""

from __future__ import annotations

from typing import Any

import pytest

from training_hub.errors import RecipeError
from training_hub.launch import laid_out
from training_hub.launch.layout import Layout, layout_of
from training_hub.launch.slurm.environment import first_host
from training_hub.recipe import Recipe

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
}


def layout(environment: dict[str, str], **processes: Any) -> Layout:
    recipe = Recipe.model_validate({"output": "o", "model": {"path": "m"}, "processes": processes})
    return layout_of(recipe, environment, lambda: 8)


def test_a_task_on_each_node_is_a_node_of_the_run():
    assert layout(STEP, procs=4) == Layout(4, 2, 1, "slurm-41.0", "gpu07", 20410)


def test_the_engine_is_asked_about_as_many_processes_as_there_are():
    recipe = Recipe.model_validate({"output": "o", "model": {"path": "m"}, "processes": {"procs": 4}})
    asked = laid_out(recipe, layout_of(recipe, STEP, lambda: 8))
    assert (asked.processes.procs, asked.processes.nodes) == (4, 2)


def test_two_jobs_and_two_steps_meet_at_ports_of_their_own():
    ports = {layout({**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port for job in ("41", "42") for step in "01"}
    assert len(ports) == 4


def test_what_the_caller_or_torchrun_says_comes_before_slurm():
    assert layout(STEP, nodes=2, node_rank=0, rdzv_endpoint="a:1") == Layout(1, 2, 0, "slurm-41.0", "a", 1)
    told = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "b:2"}
    assert layout({**STEP, **told}) == Layout(1, 2, 0, "0", "b", 2)
    assert layout({**STEP, "RANK": "3", "WORLD_SIZE": "4"}).is_rank


def test_outside_of_srun_and_in_a_single_task_nothing_is_said():
    assert layout({"SLURM_JOB_ID": "41", "SLURM_NODEID": "0"}) == Layout()
    assert layout({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}) == Layout()


def test_several_tasks_on_a_node_would_each_train_everything_and_are_refused():
    with pytest.raises(RecipeError, match=r"8 tasks on 2 nodes .* Write srun --ntasks-per-node=1"):
        layout({**STEP, "SLURM_STEP_NUM_TASKS": "8"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[01-03,7],gpu1", "node01"),
        ("node[7,9-12]", "node7"),
        ("a-[2-3]-b,c", "a-2-b"),
        ("rack[3-4]node[0-7]", "rack3node0"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str):
    assert first_host(hosts) == first

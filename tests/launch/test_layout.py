"""How many processes, and where they meet: the caller before the environment, the environment before one process."""

from __future__ import annotations

import re
from typing import Any

import pytest

from training_hub.errors import RecipeError
from training_hub.launch.layout import Layout, layout_of
from training_hub.recipe import Recipe

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def layout(processes: dict[str, Any], environment: dict[str, str] | None = None, gpus: int = 1) -> Layout:
    recipe = Recipe.model_validate({"output": "o", "model": {"path": "m"}, "processes": processes})
    return layout_of(recipe, environment or {}, lambda: gpus)


def test_without_a_word_there_is_one_process():
    found = layout({})
    assert (found.world_size, found.is_rank, found.port) == (1, False, 0)
    assert found.is_on_loopback


@pytest.mark.parametrize("word", ["auto", "gpu"])
def test_auto_and_gpu_are_one_process_for_each_gpu(word: str):
    assert layout({"procs": word}, gpus=8).procs == 8
    assert layout({}, {"PET_NPROC_PER_NODE": word}, gpus=8).procs == 8


def test_the_environment_of_torchrun_gives_what_the_caller_leaves_open():
    told = {"PET_NPROC_PER_NODE": "4", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ID": "job7"}
    found = layout({}, {**told, "PET_RDZV_ENDPOINT": "node0:1234"})
    assert found == Layout(4, 2, 1, "job7", "node0", 1234)
    assert layout({"procs": 2}, {**told, "PET_RDZV_ENDPOINT": "node0:1234"}).procs == 2
    assert layout({"procs": 1}, {"PET_NPROC_PER_NODE": "4"}).world_size == 1, "one that is written down counts as well"


@pytest.mark.parametrize(
    ("processes", "environment", "place"),
    [
        ({"nodes": 2, "rdzv_endpoint": "node0:1"}, {"PET_RDZV_ENDPOINT": "other:2"}, ("node0", 1)),
        ({"nodes": 2, "rdzv_endpoint": "node0"}, {}, ("node0", 29500)),
        ({"nodes": 2, "rdzv_endpoint": "[fe80::1]:7"}, {}, ("fe80::1", 7)),
        ({"nodes": 2, "master_addr": "node0", "master_port": 3}, {"PET_RDZV_ENDPOINT": "other:2"}, ("node0", 3)),
        ({"nodes": 2, "master_addr": "node0"}, {"MASTER_PORT": "9"}, ("node0", 29500)),
        ({"nodes": 2}, {"MASTER_ADDR": "node0", "MASTER_PORT": "9"}, ("node0", 9)),
        ({"nodes": 2}, {"PET_RDZV_ENDPOINT": "node0:1", "MASTER_ADDR": "other"}, ("node0", 1)),
        ({}, {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "9"}, ("127.0.0.1", 0)),
    ],
)
def test_where_they_meet(processes: dict[str, Any], environment: dict[str, str], place: tuple[str, int]):
    found = layout(processes, environment)
    assert (found.host, found.port) == place


def test_a_process_that_torchrun_started_is_a_rank_and_starts_none():
    assert layout({}, TORCHRUN) == Layout(4, is_rank=True, rank=1)
    assert layout({"procs": 2, "nodes": 2, "rdzv_endpoint": "node0:1"}, TORCHRUN).is_rank


@pytest.mark.parametrize(
    ("processes", "environment", "said"),
    [
        ({"procs": 8}, {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, "WORLD_SIZE is 1"),
        ({}, {"PET_NNODES": "2", "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE is 1"),
        ({"nodes": 2}, {}, "2 nodes must know where to meet. Write processes.rdzv_endpoint: HOST:PORT"),
        ({"nodes": 2, "rdzv_endpoint": "node0:http"}, {}, "allowed: HOST:PORT"),
        ({}, {"PET_NNODES": "2", "PET_NODE_RANK": "2", "PET_RDZV_ENDPOINT": "a:1"}, "allowed: 0 to 1"),
        ({}, {"PET_NPROC_PER_NODE": "many"}, "PET_NPROC_PER_NODE: found 'many'; allowed: a whole number of at least 1"),
        ({}, {"PET_MASTER_ADDR": "a", "MASTER_ADDR": "b"}, "Conflicting environment variables: PET_MASTER_ADDR=a"),
        ({}, {"PET_MASTER_ADDR": "a", "PET_RDZV_ENDPOINT": "b:1"}, "Cannot specify both"),
    ],
)
def test_what_cannot_be_is_refused_in_words(processes: dict[str, Any], environment: dict[str, str], said: str):
    with pytest.raises(RecipeError, match=re.escape(said)):
        layout(processes, environment)

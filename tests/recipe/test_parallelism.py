"""The degrees of a run multiply to its processes, or the run is refused in words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.parallelism import Degrees, Parallelism, degrees_of


@pytest.mark.parametrize(
    ("asked", "world_size", "wanted"),
    [
        ({}, 1, (1, 1)),
        ({}, 4, (4, 1)),
        ({"data_parallel_shard_degree": -1}, 4, (1, 4)),
        ({"data_parallel_shard_degree": 2}, 4, (2, 2)),
        ({"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": -1}, 8, (2, 4)),
        ({"data_parallel_replicate_degree": 1, "data_parallel_shard_degree": -1}, 1, (1, 1)),
    ],
)
def test_minus_one_takes_the_rest_of_the_processes(asked, world_size, wanted):
    found = degrees_of(Parallelism(**asked), world_size)
    assert (found.dp_replicate, found.dp_shard) == wanted
    assert found.world_size == world_size
    assert found.is_divided == (wanted[1] > 1)


def test_degrees_that_do_not_multiply_to_the_processes_are_refused_with_what_to_write():
    with pytest.raises(RecipeError) as told:
        degrees_of(Parallelism(data_parallel_replicate_degree=1, data_parallel_shard_degree=2), 4)
    assert (
        "replicate_degree 1 x data_parallel_shard_degree 2 must multiply to the number of processes, which is 4"
        in (told.value.problems[0])
    )
    assert "Write parallelism.data_parallel_replicate_degree: -1" in told.value.problems[0]
    with pytest.raises(RecipeError, match=r"must divide the number of processes, which is 4.*Start 3 processes"):
        degrees_of(Parallelism(data_parallel_shard_degree=3), 4)


@pytest.mark.parametrize("value", [0, -2, True, "2", 1.5])
def test_a_degree_is_a_count_or_minus_one(value):
    with pytest.raises(ValidationError, match="at least 1, or -1"):
        Parallelism(data_parallel_shard_degree=value)


def test_what_takes_experts_apart_takes_no_further_processes():
    assert Degrees(dp_shard=4, ep=2).world_size == 4


def test_what_is_done_with_divided_weights_needs_some():
    settings = {"model": {"path": "m"}, "output": "o"}
    for field, value in (("fsdp_reshard_after_forward", "never"), ("enable_cpu_offload", True)):
        with pytest.raises(ValidationError, match=f"{field}.*would change nothing while"):
            Recipe.model_validate({**settings, "parallelism": {field: value}})
        Recipe.model_validate({**settings, "parallelism": {field: value, "data_parallel_shard_degree": -1}})


def test_what_shares_samples_takes_processes_too():
    found = degrees_of(Parallelism(tensor_parallel_degree=2, context_parallel_degree=2), 8)
    assert (found.dp_replicate, found.cp, found.tp, found.sharers) == (2, 2, 2, 4)
    with pytest.raises(RecipeError, match=r"tensor_parallel_degree 3 must divide the number of processes, which is 4"):
        degrees_of(Parallelism(tensor_parallel_degree=3), 4)


def test_experts_go_to_processes_among_which_one_copy_of_the_model_lies():
    settings = {"expert_parallel_degree": 2, "data_parallel_shard_degree": 2}
    assert degrees_of(Parallelism(**settings), 4) == Degrees(dp_replicate=2, dp_shard=2, ep=2)
    found = degrees_of(Parallelism(**settings, tensor_parallel_degree=2, context_parallel_degree=2), 8)
    assert (found.ep, found.efsdp) == (2, 4)
    assert degrees_of(Parallelism(expert_parallel_degree=2, tensor_parallel_degree=2), 4).efsdp == 1
    with pytest.raises(RecipeError, match=r"3 does not divide 4.*shard_degree 4 x .*allowed: 1, 2, 4"):
        degrees_of(Parallelism(expert_parallel_degree=3, data_parallel_shard_degree=4), 4)
    with pytest.raises(RecipeError, match=r"2 does not divide 1, .*allowed: 1\."):
        degrees_of(Parallelism(expert_parallel_degree=2), 4)


def test_processes_with_the_same_tokens_deal_experts_out_among_themselves():
    settings = {"expert_parallel_degree": 4, "data_parallel_shard_degree": 2, "tensor_parallel_degree": 2}
    assert degrees_of(Parallelism(**settings), 4).ep == 4
    with pytest.raises(RecipeError, match="sequence_parallel: true, or 1"):
        degrees_of(Parallelism(**settings, sequence_parallel=False), 4)


def test_how_the_loss_of_a_split_vocabulary_is_taken_needs_a_split_one():
    settings = {"model": {"path": "m"}, "output": "o"}
    with pytest.raises(ValidationError, match=r"disable_loss_parallel.*would change nothing while"):
        Recipe.model_validate({**settings, "parallelism": {"disable_loss_parallel": True}})
    Recipe.model_validate({**settings, "parallelism": {"disable_loss_parallel": True, "tensor_parallel_degree": 2}})


def test_stages_take_processes_that_share_samples():
    found = degrees_of(Parallelism(pipeline_parallel_degree=2), 4)
    assert (found.dp_replicate, found.pp, found.sharers, found.is_divided) == (2, 2, 2, True)
    with pytest.raises(
        RecipeError, match=r"pipeline_parallel_degree 3 must divide the number of processes, which is 4"
    ):
        degrees_of(Parallelism(pipeline_parallel_degree=3), 4)


@pytest.mark.parametrize(
    ("field", "value"), [("schedule", "GPipe"), ("layers_per_stage", 2), ("first_stage_less_layers", 0)]
)
def test_how_stages_are_made_needs_some(field, value):
    settings = {"model": {"path": "m"}, "output": "o"}
    asked = {f"pipeline_parallel_{field}": value}
    with pytest.raises(ValidationError, match=f"{field}.*would change nothing while"):
        Recipe.model_validate({**settings, "parallelism": asked})
    Recipe.model_validate({**settings, "parallelism": {**asked, "pipeline_parallel_degree": 2}})


def test_slices_of_tokens_need_heads_that_are_split():
    settings = {"model": {"path": "m"}, "output": "o"}
    with pytest.raises(ValidationError, match=r"sequence_parallel.*false would change nothing while"):
        Recipe.model_validate({**settings, "parallelism": {"sequence_parallel": False}})
    Recipe.model_validate({**settings, "parallelism": {"sequence_parallel": False, "tensor_parallel_degree": 2}})

"""Stages whose weights lie in slices, in orders that make gradients of weights later.

Float32, plain SGD at a small rate and 1e-5, for the reasons that test_pipeline.py gives.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.crew import Crew
from tests.distributed.lacking import lacks_order
from tests.distributed.test_divided_further import ROUNDED
from tests.distributed.test_equal_numbers import STEPS, apart, weights
from tests.distributed.test_osft_of_split_models import OSFT
from tests.distributed.test_pipeline import CLOSE, SGD, SMALL_PACKS, TWO, all_moved, roughly_same_steps
from tests.distributed.test_pipeline_adapters import FOUR_LAYERS, LONGER, ON_TABLES
from tests.distributed.test_pipeline_further import (
    IN_TURN,
    LIBRARIES,
    LORA,
    NOISE,
    ONE_STEP,
    TEACHER,
    WIDE,
    same_weights,
)  # fmt: skip
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import train
from training_hub.backends.torch_engine.layouts.abilities import can_split_backward
from training_hub.backends.torch_engine.layouts.stages import ORDERS, late, stages_of, under_way
from training_hub.recipe.parallelism import Parallelism

SLICES = {**TWO, "data_parallel_shard_degree": 2}
BACK, INTERLEAVED = (
    {**SLICES, "pipeline_parallel_schedule": order} for order in ("ZBVZeroBubble", "InterleavedZeroBubble")
)
WHOLE = {"fsdp_reshard_after_forward": "never"}
AGAIN = {"training": {**SMALL_PACKS, "activation_checkpointing": "full"}}
PROVED = {"training": {**SMALL_PACKS, "preflight": True}}
SUBSPACES = {"algorithm": "osft", "osft": OSFT}

Case = tuple[str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    **{
        f"{family}, {name}{kept}": (family, {**order, **settings}, {})
        for family in ("llama", "llama-tied", "qwen3", "qwen3-moe")
        for name, order in {"there and back": BACK, "two stages in each process": INTERLEAVED}.items()
        for kept, settings in {"": {}, ", whole in a step": WHOLE}.items()
    },
    "fewer packs than stages": ("llama-tied", BACK, {"training": STEPS}),
    "many packs, layers made again": (
        "qwen3",
        INTERLEAVED,
        {"training": {**AGAIN["training"], "global_batch_size": 12}},
    ),
    "layers made again, whole in a step": ("llama", {**BACK, **WHOLE}, AGAIN),
    "experts made again": ("qwen3-moe", BACK, AGAIN),
    "now and then no sample": ("qwen3", INTERLEAVED, {"training": {**SMALL_PACKS, "global_batch_size": 3}}),
    "one document after another": ("llama", BACK, {"data": {"packing": False}}),
    "with proofs": ("llama-tied", BACK, PROVED),
    "with proofs, whole in a step": ("llama", {**INTERLEAVED, **WHOLE}, PROVED),
    "with proofs, one stage each, whole in a step": ("llama", {**SLICES, **WHOLE}, PROVED),
    "a loss with more to it": ("llama", INTERLEAVED, {"loss": {"label_smoothing": 0.1, "z_loss": 1e-3}}),
    "a first stage that stays as it is": ("llama", BACK, {"freezing": {"blocks": 2, "embeddings": True}}),
    "a last stage that stays as it is": ("llama", INTERLEAVED, {"freezing": {"weights": ["layers.3", "lm_head"]}}),
    "experts dealt out": ("qwen3-moe", {**BACK, "expert_parallel_degree": 2}, {}),
    "experts dealt out and made again": ("mixtral", {**INTERLEAVED, "expert_parallel_degree": 2}, AGAIN),
    "an adapter": ("qwen3", BACK, LORA),
    "an adapter on table and head": ("llama", INTERLEAVED, {**LORA, **ON_TABLES}),
    "an adapter, layers made again": ("llama", {**BACK, **WHOLE}, {**LORA, **AGAIN}),
    "an adapter, int4": ("llama", BACK, {**LORA, "model": {"quantization": "int4"}}),
    "subspaces": ("llama-tied", BACK, SUBSPACES),
    "subspaces, layer by layer": ("qwen3", INTERLEAVED, {**SUBSPACES, "osft": {**OSFT, "gradients": "layer"}}),
    "a teacher": ("llama", BACK, {"distillation": TEACHER}),
    "noise": ("llama-tied", INTERLEAVED, NOISE),
    "unfrozen in turn": ("qwen3", BACK, IN_TURN),
    "rounded": ("llama", INTERLEAVED, {**ROUNDED, **ONE_STEP}),
    **{
        f"{family} there and back": (family, BACK, {})
        for family in ("gemma2", "gemma3", "phi", "phi3", "granite", "cohere", "mixtral", "gpt-oss", "deepseek-v3")
    },
}
OF_EIGHT: dict[str, Case] = {
    "replicas": ("llama-tied", {**BACK, "data_parallel_replicate_degree": 2}, {}),
    "replicas, whole in a step": ("qwen3", {**INTERLEAVED, **WHOLE, "data_parallel_replicate_degree": 2}, {}),
    "replicas in one stage each": (
        "llama",
        {**SLICES, "data_parallel_replicate_degree": 2},
        {"training": {**SMALL_PACKS, "global_batch_size": 3}},
    ),
    "heads": ("qwen3", {**BACK, "tensor_parallel_degree": 2}, {}),
    "heads and experts, layers made again": ("qwen3-moe", {**INTERLEAVED, "tensor_parallel_degree": 2}, AGAIN),
    "tokens": ("llama-tied", {**INTERLEAVED, "context_parallel_degree": 2}, {}),
    "experts in slices": (
        "qwen3-moe",
        {**BACK, "data_parallel_shard_degree": 4, "expert_parallel_degree": 2},
        {},
    ),
    "experts in slices, made again": (
        "qwen3-moe",
        {**BACK, "data_parallel_shard_degree": 4, "expert_parallel_degree": 2},
        AGAIN,
    ),
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    crew = Crew(8, tmp_path_factory.mktemp("crew") / "eight.log")
    yield crew
    crew.close()


def same_run(case: Case, crew: Crew, folders: Any, uneven_file: Path, tmp_path: Path) -> None:
    family, parallelism, sections = case
    settings = {"training": SMALL_PACKS, "optimizer": SGD, "evaluation": {"interval": 2}, **sections}
    settings["data"] = {"validation_fraction": 0.2, **settings.get("data", {})}
    if "distillation" in settings:
        settings["distillation"] = {**TEACHER, "teacher": str(folders("qwen3", hidden_size=48))}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3" else {}
    shape = WIDE if "qat" in settings or "quantization" in settings.get("model", {}) else FOUR_LAYERS
    model = folders(family, **shape, **kinds)
    together = crew.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    if lacks_order(together, parallelism):
        return
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_weights(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [{**BACK, **WHOLE}, INTERLEAVED])
def test_a_small_rate_moves_bfloat16_weights(parallelism, four, folders, uneven_file, tmp_path):
    settings = {"model": {"dtype": "bfloat16"}, **PROVED, "optimizer": {"lr": 1e-6}}
    model = folders("qwen3", **FOUR_LAYERS)
    together = four.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    if lacks_order(together, parallelism):
        return
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    roughly_same_steps(alone, together, "loss", "grad_norm")
    all_moved(model, together)


@pytest.mark.slow
def test_a_run_goes_on_in_slices_and_stages_of_another_order(four, folders, uneven_file, tmp_path):
    if not can_split_backward():
        pytest.skip("torch makes gradients of weights wrongly by themselves")
    model, output = folders("llama-tied", **FOUR_LAYERS), tmp_path / "run"
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **LONGER)
    for step, parallelism in ((2, BACK), (5, {"data_parallel_shard_degree": 4})):
        order = {"signalled": 1, "step": step}
        ended = four.train(model, uneven_file, output, order, parallelism=parallelism, **LONGER)
        assert [each.get("error") for each in ended] == ["Interrupted"] * 4, ended
    resumed = four.train(model, uneven_file, output, parallelism={**INTERLEAVED, **WHOLE}, **LONGER)
    same_steps(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE


def test_gradients_of_slices_that_are_made_later_are_those_of_a_whole_backward_pass(two):
    """The same products and sums, of single numbers in another order."""
    if not can_split_backward():
        pytest.skip("torch makes gradients of weights wrongly by themselves")
    for found in two.call("tests.distributed.sending:made_later"):
        assert found["number"] > 10 and found["early"] == 0
        assert found["apart"] <= 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_processes_find_the_numbers_of_one(case, four, folders, uneven_file, tmp_path):
    wanted = next((name for word, name in LIBRARIES.items() if word in case), "torch")
    if find_spec(wanted) is None:
        pytest.skip("the library is not installed")
    same_run(CASES[case], four, folders, uneven_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_EIGHT)
def test_eight_processes_find_them_beside_other_ways(case, eight, folders, uneven_file, tmp_path):
    same_run(OF_EIGHT[case], eight, folders, uneven_file, tmp_path)


def as_planned(crew: Crew, order: str, degree: int) -> None:
    asked = Parallelism(pipeline_parallel_degree=degree, pipeline_parallel_schedule=order)
    stages, packs = stages_of(asked, 2 * degree), 2 * degree
    for place, (most, beside, waiting) in enumerate(
        crew.call("tests.distributed.sending:under_way_at_most", order, packs)
    ):
        assert most == pytest.approx(under_way(asked, stages, place, packs))
        assert (beside, waiting) == pytest.approx(late(asked, stages, place, packs))


@pytest.mark.parametrize("order", ["ZBVZeroBubble", "InterleavedZeroBubble"])
def test_as_many_packs_are_under_way_and_wait_as_is_planned(order, two):
    as_planned(two, order, 2)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ZBVZeroBubble", "InterleavedZeroBubble"])
def test_in_pipelines_of_four_too(order, four):
    as_planned(four, order, 4)


PACKS = 4
"""As many as there are stages."""


def in_a_step(four: Crew, parallelism: dict[str, Any], checkpointing: str = "none") -> list[dict[str, Any]]:
    """What the two processes of the second place of the pipeline, which have no first stage, do in a step."""
    if ORDERS[parallelism.get("pipeline_parallel_schedule", "1F1B")].splits and not can_split_backward():
        pytest.skip("torch makes gradients of weights wrongly by themselves")
    return four.call("tests.distributed.sending:in_a_step", parallelism, PACKS, checkpointing)[2:]


@pytest.mark.slow
@pytest.mark.parametrize(("parallelism", "times"), [(SLICES, 2), (INTERLEAVED, 3)])
def test_weights_are_gathered_for_each_pass_of_a_pack_and_gradients_added_up_once(parallelism, times, four):
    for found in in_a_step(four, parallelism):
        assert found["summed"] == PACKS * found["weights"]
        assert (times - 1) * PACKS * found["weights"] < found["gathered"] <= times * PACKS * found["weights"]
        assert found["sent"] == found["planned"]


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [SLICES, INTERLEAVED])
def test_they_are_once_in_a_step_where_they_stay_whole(parallelism, four):
    """What stands around the layers is gathered once more where a stage without it comes last."""
    for found in in_a_step(four, {**parallelism, **WHOLE}):
        assert found["summed"] == found["weights"]
        assert found["gathered"] in (found["weights"], found["weights"] + found["around"])
        assert found["sent"] <= found["planned"] + 4 * found["around"] / 2


@pytest.mark.slow
def test_replicas_add_up_once_in_a_step(eight):
    if not can_split_backward():
        pytest.skip("torch makes gradients of weights wrongly by themselves")
    replicas = {**INTERLEAVED, "data_parallel_replicate_degree": 2}
    for found in eight.call("tests.distributed.sending:in_a_step", replicas, PACKS):
        assert found["added_up"] == 3  # two layers, and what stands around them


@pytest.mark.slow
@pytest.mark.parametrize(("parallelism", "times"), [(SLICES, 2), (BACK, 3)])
def test_layers_that_forget_are_made_again_once_for_each_backward_pass(parallelism, times, four):
    for found in in_a_step(four, parallelism, "full"):
        assert found["passes"] == times * PACKS * 2  # layers


@pytest.mark.slow
def test_tokens_that_products_enter_are_gathered_again_once_for_all_of_these(four):
    """Attention and MLP of both layers: forward, in backward for weights, and the gradients of what they give."""
    heads = {**TWO, "tensor_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"}
    for found in in_a_step(four, heads):
        assert found["gathered"] == 3 * PACKS * 2 * 2 * found["rows"]

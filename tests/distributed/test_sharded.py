"""A model that is divided over processes trains as a whole one does: losses, gradient norms, weights, checkpoints.

Float32, plain SGD, as in test_equal_numbers.py, whose reasons for both hold here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.crew import Crew
from tests.distributed.test_equal_numbers import SGD, STEPS, apart, same_steps, weights
from tests.distributed.test_split_models import EXPERTS
from tests.distributed.test_split_models import same_steps as same_to_rounding
from tests.invariants.run import train
from tests.invariants.test_families import folder_of
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.folders import damage

CLOSE = 1e-5
SHARDED = {"data_parallel_shard_degree": -1}
SMALL_PACKS = {**STEPS, "max_tokens_per_gpu": 256}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory):
    crew = Crew(4, tmp_path_factory.mktemp("crew") / "four.log")
    yield crew
    crew.close()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("llama", {}),
    "uneven packs, accumulated, weights let go": ("qwen3", {"training": SMALL_PACKS}),
    "uneven packs, accumulated, weights kept": (
        "llama",
        {"training": SMALL_PACKS, "parallelism": {**SHARDED, "fsdp_reshard_after_forward": "never"}},
    ),
    "a mixture of experts": ("qwen3-moe", {"training": SMALL_PACKS}),
    "a process without samples": ("llama", {"training": {**STEPS, "global_batch_size": 1}}),
    "activations made again": ("llama", {"training": {**STEPS, "activation_checkpointing": "full"}}),
    "lora": ("llama", {"algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}}),
    "osft": (
        "llama",
        {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False}, "checkpoint": {"interval": 4}},
    ),
    "distillation": ("llama", {"distillation": {"teacher": "another", "alpha": 0.5}}),
    "with proofs": ("llama", {"training": {**STEPS, "preflight": True}}),
}


def settings_of(sections: dict[str, Any]) -> dict[str, Any]:
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 1}, "parallelism": SHARDED, **sections}
    return {**settings, "data": {"validation_fraction": 0.2, **settings.get("data", {})}}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_a_model_each_find_the_numbers_of_one(
    case,
    two,
    tiny_model_folder,
    uneven_file,
    tmp_path,
):
    family, sections = CASES[case]
    model = folder_of(family, tiny_model_folder, tmp_path / "model")
    settings = settings_of(sections)
    if case == "distillation":
        settings["distillation"] |= {"teacher": str(folder_of("qwen3", tiny_model_folder, tmp_path / "teacher"))}
    together = two.train(model, uneven_file, tmp_path / "together", **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)
    name = "adapter_model" if case == "lora" else "model"
    assert apart(weights(alone.model_path, name), weights(together[0]["model_path"], name)) <= CLOSE


def test_bfloat16_keeps_float32_slices_and_the_best_step_is_gathered(
    two,
    tiny_model_folder,
    uneven_file,
    tmp_path,
):
    """8 bits of mantissa, and sums in another order: losses agree to 2 %, final weights to what a step moves."""
    settings = settings_of({"model": {"dtype": "bfloat16", "save_dtype": "float32"}})
    settings |= {
        "optimizer": {"name": "AdamWScheduleFree", "lr": 1e-3},
        "lr_scheduler": {"name": "constant"},
        "checkpoint": {"keep_best": True, "interval": 1},
        "training": SMALL_PACKS,
    }
    together = two.train(tiny_model_folder, uneven_file, tmp_path / "together", **settings)
    alone = train(tiny_model_folder, uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    for each in together:
        assert each.get("status") == "finished", each
        for row, wanted in zip(each["history"], alone.history, strict=True):
            for key in ("loss", "grad_norm", "validation_loss"):
                assert row[key] == pytest.approx(wanted[key], rel=0.02)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= 4e-3
    saved = opened(sorted((tmp_path / "together/checkpoints/step-4").glob("model-rank*")))
    with saved as files:
        assert files.read("model.norm.weight").dtype == torch.float32


STILL = {"optimizer": {"lr": 1e-30}, "model": {"dtype": "bfloat16"}, "training": {**STEPS, "steps": 2}}


@pytest.mark.parametrize(
    "sections",
    [
        {"freezing": {"blocks": 1, "embeddings": True}},
        {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False, "others": "freeze"}},
    ],
    ids=["in part frozen", "osft"],
)
def test_what_does_not_move_is_what_the_files_hold_though_bfloat16_is_computed(
    sections,
    two,
    tiny_model_folder,
    uneven_file,
    tmp_path,
):
    settings = {"parallelism": SHARDED, **STILL, **sections}
    together = two.train(tiny_model_folder, uneven_file, tmp_path / "together", **settings)
    assert together[0].get("status") == "finished", together
    final, base = weights(together[0]["model_path"]), weights(tiny_model_folder)
    assert final.keys() == base.keys() and all(torch.equal(final[name], one) for name, one in base.items())


HYBRID = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}


@pytest.mark.parametrize("layout", [SHARDED, HYBRID], ids=["four slices", "two replicas of two slices"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_four_processes_find_them_too(
    layout,
    family,
    four,
    tiny_model_folder,
    uneven_file,
    tmp_path,
):
    model = folder_of(family, tiny_model_folder, tmp_path / "model")
    settings = settings_of({"training": SMALL_PACKS, "parallelism": layout})
    together = four.train(model, uneven_file, tmp_path / "together", **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


STAGES = {"pipeline_parallel_degree": 2}


@pytest.mark.parametrize(
    "layout", [{**STAGES, "tensor_parallel_degree": 2}, {**STAGES, **EXPERTS}], ids=["split heads", "experts"]
)
def test_four_processes_find_them_in_stages_of_slices(layout, four, tiny_model_folder, uneven_file, tmp_path):
    """Other cases: test_stages_beside_other_ways.py."""
    model = folder_of("qwen3-moe", tiny_model_folder, tmp_path / "model")
    settings = settings_of({"training": SMALL_PACKS, "parallelism": layout, "optimizer": {"name": "SGD", "lr": 0.01}})
    together = four.train(model, uneven_file, tmp_path / "together", **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_to_rounding(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


def test_a_run_goes_on_in_other_numbers_of_processes_and_other_layouts(
    two,
    four,
    tiny_model_folder,
    uneven_file,
    tmp_path,
):
    settings = {
        "training": {"global_batch_size": 4, "epochs": 1, "preflight": False},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"interval": 1},
    }
    unbroken = train(tiny_model_folder, uneven_file, tmp_path / "unbroken", **settings)
    output = tmp_path / "run"

    def stopped(crew: Crew, parallelism: dict[str, Any], step: int) -> list[str]:
        order = {"signalled": 1, "step": step}
        ended = crew.train(tiny_model_folder, uneven_file, output, order, **settings, parallelism=parallelism)
        assert [each.get("error") for each in ended] == ["Interrupted"] * len(ended), ended
        newest = max((output / "checkpoints").iterdir(), key=lambda one: int(one.name[5:]))
        assert not damage(newest)
        return sorted(path.name for path in newest.glob("model*"))

    assert stopped(four, HYBRID, 1) == ["model-rank0.safetensors", "model-rank1.safetensors"]
    assert stopped(two, SHARDED, 3) == ["model-rank0.safetensors", "model-rank1.safetensors"]
    assert stopped(two, {}, 5) == ["model.safetensors"], "replicas write one"
    assert stopped(four, SHARDED, 7) == [f"model-rank{rank}.safetensors" for rank in range(4)]
    resumed = train(tiny_model_folder, uneven_file, output, **settings)
    assert [row["step"] for row in resumed.history] == [row["step"] for row in unbroken.history]
    for row, wanted in zip(resumed.history, unbroken.history, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert weights(resumed.model_path).keys() == weights(unbroken.model_path).keys()


def test_what_osft_protects_goes_on_whole_from_divided_weights(
    two,
    tiny_model_folder,
    uneven_file,
    tmp_path,
):
    settings = {
        "algorithm": "osft",
        "osft": {"unfreeze_rank_ratio": 0.5, "cache": False},
        "training": {"global_batch_size": 4, "epochs": 1, "preflight": False},
        "optimizer": SGD,
        "checkpoint": {"interval": 1},
    }
    unbroken = train(tiny_model_folder, uneven_file, tmp_path / "unbroken", **settings)
    order = {"signalled": 0, "step": 2}
    ended = two.train(tiny_model_folder, uneven_file, tmp_path / "run", order, **settings, parallelism=SHARDED)
    assert [each.get("error") for each in ended] == ["Interrupted"] * 2, ended
    resumed = train(tiny_model_folder, uneven_file, tmp_path / "run", **settings)
    assert apart(weights(unbroken.model_path), weights(resumed.model_path)) <= CLOSE


REFUSED: dict[str, dict[str, Any]] = {
    "int4 keeps a scale": {
        "parallelism": {"tensor_parallel_degree": 2},
        "algorithm": "lora_sft",
        "model": {"quantization": "int4"},
    },
    "enable_cpu_offload": {"parallelism": {**SHARDED, "enable_cpu_offload": True}},
    "must divide": {"parallelism": {"data_parallel_shard_degree": 3}},
}


def test_what_a_divided_model_cannot_do_is_refused_before_loading(two, tiny_model_folder, chat_file, tmp_path):
    for words, sections in REFUSED.items():
        output = tmp_path / words.replace(" ", "")
        settings = {"parallelism": SHARDED, "data": {"validation_fraction": 0.2}, **sections}
        ended = two.train(tiny_model_folder, chat_file, output, **settings)
        assert [each["error"] for each in ended] == ["RecipeError"] * 2
        assert words in "\n".join(ended[0]["problems"])
        assert not output.exists()


def test_a_run_has_nothing_of_the_mesh_of_the_one_before(two):
    """Groups of the second have other names, and those of the first are gone."""
    for others in (0, 2):
        for found, is_own in two.call("tests.distributed.meshes:sum_on_a_mesh", others):
            assert found == [0.0, 2.0, 4.0, 6.0] and is_own

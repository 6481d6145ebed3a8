"""A model whose layers are dealt out in stages finds the numbers of one process, in whatever order the stages work.

Float32. What passes between stages is the same bits as within one process; gradients are added up pack by pack in
another order, and norms over stages, so that numbers differ by rounding; what is promised is 1e-5. Weights are compared
under plain SGD, for the reason that test_equal_numbers.py gives; its rate is small, since these random models of four
layers make of a difference of 1e-7 in one step one of 1e-5 in the norm of the next but one at a rate of 0.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.backends.torch_engine.tiny_models import tiny_model
from tests.distributed.crew import Crew
from tests.distributed.lacking import lacks_order
from tests.distributed.test_equal_numbers import STEPS, apart, weights
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import recipe, train
from training_hub.backends import Given
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.errors import TrainingError
from training_hub.folders import damage
from training_hub.launch import run

CLOSE = 1e-5
SGD = {"name": "SGD", "lr": 0.01}
SMALL_PACKS = {**STEPS, "max_tokens_per_gpu": 256}
TWO = {"pipeline_parallel_degree": 2}


@pytest.fixture(scope="module")
def folders(tiny_model_folder, tmp_path_factory) -> Any:
    """A folder for each family of tiny models, of four layers, made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str, **changes: Any) -> Path:
        made = root / "-".join([family, *map(str, changes.values())])
        if not made.exists():
            tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
            changes = {"num_hidden_layers": 4, "layer_types": LAYER_TYPES.get(family), **changes}
            changes = {name: value for name, value in changes.items() if value is not None}
            tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=512, **changes).save_pretrained(made)
            tokenizer.save_pretrained(made)
        return made

    return folder


LAYER_TYPES = {"gemma3": ["sliding_attention", "full_attention"] * 2}

Case = tuple[str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "one forward, one backward": ("qwen3", {}, {"training": SMALL_PACKS}),
    "a table that is also the head, fewer packs than stages": ("llama-tied", {}, {}),
    "two stages in each process": (
        "llama",
        {"pipeline_parallel_schedule": "Interleaved1F1B"},
        {"training": SMALL_PACKS},
    ),
    "stages there and back, a table that is also the head": (
        "llama-tied",
        {"pipeline_parallel_schedule": "ZBVZeroBubble"},
        {"training": SMALL_PACKS},
    ),
    "gradients of weights made later, layers made again": (
        "qwen3",
        {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
        {"training": {**SMALL_PACKS, "activation_checkpointing": "full"}},
    ),
    "forward with all packs first, of a mixture of experts": (
        "qwen3-moe",
        {"pipeline_parallel_schedule": "GPipe"},
        {"training": SMALL_PACKS},
    ),
}

MORE_CASES: dict[str, Case] = {
    **{
        f"{order}, {packs}": (
            "llama",
            {"pipeline_parallel_schedule": order},
            {"training": {**STEPS, **settings}, "data": {"packing": packs != "one document after another"}},
        )
        for order in ("1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
        for packs, settings in {
            "a single pack": {},
            "many packs": {"max_tokens_per_gpu": 256, "global_batch_size": 12},
            "one document after another": {},
        }.items()
    },
    **{
        f"{order}, products kept": (
            "llama",
            {"pipeline_parallel_schedule": order},
            {"training": {**SMALL_PACKS, "activation_checkpointing": "selective"}},
        )
        for order in ("1F1B", "GPipe", "Interleaved1F1B")
    },
    **{
        f"stages of {family}": (family, {"pipeline_parallel_schedule": "Interleaved1F1B"}, {"training": SMALL_PACKS})
        for family in (
            "qwen2",
            "gemma",
            "gemma2",
            "gemma3",
            "mistral",
            "phi",
            "phi3",
            "cohere",
            "granite",
            "mixtral",
            "gpt-oss",
            "deepseek-v3",
        )
    },
    "stages of one layer and of three": (
        "llama",
        {"pipeline_parallel_first_stage_less_layers": 2, "pipeline_parallel_last_stage_less_layers": 0},
        {"training": SMALL_PACKS},
    ),
    "a first stage that stays as it is": (
        "llama",
        {},
        {"training": SMALL_PACKS, "freezing": {"blocks": 2, "embeddings": True}},
    ),
    "a loss with more to it": (
        "llama",
        {},
        {"training": SMALL_PACKS, "loss": {"label_smoothing": 0.1, "z_loss": 1e-3}},
    ),
    "checkpoints written meanwhile": (
        "llama-tied",
        {},
        {"training": SMALL_PACKS, "checkpoint": {"interval": 1, "async_mode": "async"}},
    ),
    "with proofs": ("llama-tied", {}, {"training": {**SMALL_PACKS, "preflight": True}}),
}

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES]


@pytest.mark.parametrize("case", [*CASES, *SLOW])
def test_two_processes_with_half_the_layers_each_find_the_numbers_of_one(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = {**CASES, **MORE_CASES}[case]
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 2}, **sections}
    settings["data"] = {"validation_fraction": 0.2, **settings.get("data", {})}
    together = two.train(
        folders(family), uneven_file, tmp_path / "together", parallelism={**TWO, **parallelism}, **settings
    )
    if lacks_order(together, parallelism):
        return
    alone = train(folders(family), uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


PRODUCTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "two pipelines of two": ("llama-tied", TWO, {}),
    "two pipelines, one of which has no samples": ("qwen3", TWO, {"global_batch_size": 1}),
    "a pipeline of four": ("llama-tied", {"pipeline_parallel_degree": 4}, {}),
    "a pipeline of slices of weights": ("llama-tied", {**TWO, "data_parallel_shard_degree": 2}, {}),
    "a pipeline of slices that stay whole in a step": (
        "qwen3-moe",
        {
            **TWO,
            "data_parallel_shard_degree": 2,
            "fsdp_reshard_after_forward": "never",
            "pipeline_parallel_schedule": "Interleaved1F1B",
        },
        {"global_batch_size": 3},
    ),
    "two pipelines there and back": ("qwen3-moe", {**TWO, "pipeline_parallel_schedule": "ZBVZeroBubble"}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS)
def test_four_processes_find_them_in_pipelines_side_by_side(case, four, folders, uneven_file, tmp_path):
    family, parallelism, training = PRODUCTS[case]
    settings = {"training": {**SMALL_PACKS, **training}, "optimizer": SGD, "evaluation": {"interval": 2}}
    settings["data"] = {"validation_fraction": 0.2}
    together = four.train(folders(family), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    alone = train(folders(family), uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


def test_a_run_goes_on_in_stages_and_without(two, folders, uneven_file, tmp_path):
    model, output = folders("llama-tied"), tmp_path / "run"
    settings = {
        "training": {"global_batch_size": 4, "epochs": 1, "preflight": False, "max_tokens_per_gpu": 256},
        "optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9},
        "checkpoint": {"interval": 1},
    }
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **settings)

    def stopped(crew: Crew, parallelism: dict[str, Any], step: int) -> Path:
        order = {"signalled": 1, "step": step}
        ended = crew.train(model, uneven_file, output, order, parallelism=parallelism, **settings)
        assert [each.get("error") for each in ended] == ["Interrupted"] * 2, ended
        newest = max((output / "checkpoints").iterdir(), key=lambda one: int(one.name[5:]))
        assert not damage(newest)
        return newest

    step = stopped(two, TWO, 2)
    names = []
    for rank in (0, 1):
        with opened([step / f"model-rank{rank}.safetensors"]) as files:
            names.append(set(files.shapes))
    assert "model.embed_tokens.weight" in names[0] and "model.norm.weight" in names[1]
    assert not names[0] & names[1], "each weight is written once"

    def stop(report: Any) -> None:
        raise KeyError("the plug was pulled")

    with pytest.raises(TrainingError, match="the plug was pulled"):
        run(recipe(model, uneven_file, output, **settings), Given(watchers=[stop]))
    stopped(two, {}, 5)
    resumed = two.train(
        model, uneven_file, output, parallelism={**TWO, "pipeline_parallel_schedule": "Interleaved1F1B"}, **settings
    )
    same_steps(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE


@pytest.mark.slow
def roughly_same_steps(alone: Any, together: list[dict[str, Any]], *keys: str) -> None:
    """With 8 bits of mantissa, and sums in another order, steps agree to 1 %."""
    assert together[0].get("status") == "finished", together[0]
    for row, wanted in zip(together[0]["history"], alone.history, strict=True):
        for key in keys:
            assert row[key] == pytest.approx(wanted[key], rel=0.01), key


def all_moved(model: Path, together: list[dict[str, Any]]) -> None:
    """Training has moved a number of each weight, however small the rate, from what bfloat16 made of it."""
    before, after = weights(model), weights(together[0]["model_path"])
    assert not [name for name in before if not (before[name].bfloat16().float() != after[name]).any()]


@pytest.mark.parametrize("order", ["1F1B", "ZBVZeroBubble"])
def test_a_small_rate_moves_bfloat16_weights_in_stages(order, two, folders, uneven_file, tmp_path):
    settings = {
        "model": {"dtype": "bfloat16"},
        "training": {**SMALL_PACKS, "preflight": True},
        "optimizer": {"lr": 1e-6},
    }
    stages = {**TWO, "pipeline_parallel_schedule": order}
    model = folders("qwen3")
    together = two.train(model, uneven_file, tmp_path / "together", parallelism=stages, **settings)
    if lacks_order(together, stages):
        return
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    roughly_same_steps(alone, together, "loss", "grad_norm")
    all_moved(model, together)


@pytest.mark.slow
def test_the_loss_of_each_source_is_told_by_the_last_stage(two, folders, uneven_file, tmp_path):
    lines, files = uneven_file.read_text().splitlines(keepends=True), []
    for name, part in (("short.jsonl", lines[:10]), ("long.jsonl", lines[10:])):
        files.append(tmp_path / name)
        files[-1].write_text("".join(part))
    settings = {"training": SMALL_PACKS, "optimizer": SGD, "data": {"path": [str(file) for file in files]}}
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **settings)
    together = two.train(folders("llama"), uneven_file, tmp_path / "together", parallelism=TWO, **settings)
    same_steps(alone, together)
    for each in together:
        for row, wanted in zip(each["history"], alone.history, strict=True):
            for key in ("source_loss/short.jsonl", "source_loss/long.jsonl"):
                assert row.get(key) == pytest.approx(wanted.get(key), rel=CLOSE)

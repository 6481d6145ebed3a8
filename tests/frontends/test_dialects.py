"""Every keyword of a function gives the setting it is documented to give, and nothing is accepted and ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_hub.algorithms import INSTRUCTLAB
from training_hub.errors import RecipeError
from training_hub.frontends.dialects import KEYWORDS, is_live, recipe_from, request_from
from training_hub.recipe import Recipe
from training_hub.recipe.findings import value_at
from training_hub.recipe.load import Layer, layer_of
from training_hub.recipe.names import all_settings

NEEDED = {"model_path": "m", "data_path": "d", "ckpt_output_dir": "o"}


def recipe_of(backend: str = "instructlab-training", **keywords: Any) -> Recipe:
    request = request_from({**NEEDED, **keywords})
    return recipe_from(request.layer, algorithm="sft", backend=backend, live=request.live)


def problems_of(**keywords: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe_of(**keywords)
    return caught.value.problems


# keyword, value, other keywords it needs, setting, what that is then
MEANINGS: list[tuple[str, Any, dict[str, Any], str, Any]] = [
    ("model_path", Path("models/a"), {}, "model.path", "models/a"),
    ("data_path", ["a.jsonl", {"path": "b", "weight": 2}], {}, "data.path", None),
    ("ckpt_output_dir", "out", {}, "output", "out"),
    ("num_epochs", 3, {}, "training.epochs", 3),
    ("effective_batch_size", 2048, {}, "training.global_batch_size", 2048),
    ("batch_size", 6, {}, "training.global_batch_size", 6),
    ("learning_rate", 1e-5, {}, "optimizer.lr", 1e-5),
    ("max_seq_len", 2048, {}, "training.max_seq_len", 2048),
    ("max_tokens_per_gpu", 8192, {}, "training.max_tokens_per_gpu", 8192),
    ("max_batch_len", 8192, {}, "training.max_tokens_per_gpu", 8192),
    ("data_output_dir", "cache", {}, "data.cache_dir", "cache"),
    ("save_samples", 100, {}, "checkpoint.save_samples", 100),
    ("warmup_steps", 10, {}, "lr_scheduler.warmup_steps", 10),
    ("warmup_ratio", 0.1, {}, "lr_scheduler.warmup_ratio", 0.1),
    ("accelerate_full_state_at_epoch", False, {}, "checkpoint.at_epoch", False),
    ("checkpoint_at_epoch", False, {}, "checkpoint.at_epoch", False),
    ("max_steps", 7, {}, "training.steps", 7),
    ("seed", 1, {}, "seed", 1),
    ("random_seed", 1, {}, "seed", 1),
    ("lr_scheduler", "constant_with_warmup", {}, "lr_scheduler.name", "constant"),
    ("lr_scheduler_kwargs", {"min_lr": 1e-7}, {}, "lr_scheduler.min_lr", 1e-7),
    ("beta1", 0.8, {}, "optimizer.beta1", 0.8),
    ("beta2", 0.999, {}, "optimizer.beta2", 0.999),
    ("eps", 1e-6, {}, "optimizer.eps", 1e-6),
    ("weight_decay", 0.1, {}, "optimizer.weight_decay", 0.1),
    ("max_grad_norm", 0.5, {}, "training.max_norm", 0.5),
    ("is_pretraining", True, {}, "data.pretraining", True),
    ("block_size", 128, {"is_pretraining": True}, "data.block_size", 128),
    ("document_column_name", "body", {}, "data.columns", {"text": "body"}),
    ("chat_template", "chatml", {}, "data.chat_template", "chatml"),
    ("chat_tmpl_path", "t.jinja", {}, "data.chat_template", "t.jinja"),
    ("unmask_messages", True, {}, "data.unmask", True),
    ("use_processed_dataset", True, {}, "data.format", "tokens"),
    ("validation_data_path", "v.jsonl", {}, "data.validation", "v.jsonl"),
    ("validation_split", 0.1, {}, "data.validation_fraction", 0.1),
    ("validation_frequency", 5, {"validation_split": 0.1}, "evaluation.interval", 5),
    ("generate", 8, {"validation_split": 0.1}, "evaluation.generate", 8),
    ("metrics", "f1", {"generate": True, "validation_split": 0.1}, "evaluation.metrics", ["f1"]),
    ("validate_at_epoch", False, {}, "evaluation.at_epoch", False),
    ("save_best_val_loss", True, {"validation_split": 0.1}, "checkpoint.keep_best", True),
    ("save_final_checkpoint", False, {}, "checkpoint.final", False),
    ("keep_last_checkpoint_only", True, {}, "checkpoint.keep_last", 1),
    ("save_dtype", "float16", {}, "model.save_dtype", "float16"),
    ("trust_remote_code", True, {}, "model.trust_remote_code", True),
    ("disable_flash_attn", True, {}, "model.attention", "documents"),
    ("teacher_model", "t", {}, "distillation.teacher", "t"),
    ("distill_divergence", "reverse_kl", {"teacher_model": "t"}, "distillation.divergence", "reverse_kl"),
    ("distill_temperature", 3.0, {"teacher_model": "t"}, "distillation.temperature", 3.0),
    ("distill_alpha", 0.7, {"teacher_model": "t"}, "distillation.alpha", 0.7),
    ("distill_cache", "top_k", {"teacher_model": "t"}, "distillation.cache", "top_k"),
    ("distill_prompt", "Be brief.", {"teacher_model": "t"}, "distillation.prompt", "Be brief."),
    ("distill_max_teacher_length", 512, {"teacher_model": "t"}, "distillation.max_teacher_length", 512),
    ("nproc_per_node", "2", {}, "processes.procs", 2),
    ("nnodes", 2, {}, "processes.nodes", 2),
    ("node_rank", 1, {"nnodes": 2}, "processes.node_rank", 1),
    ("rdzv_id", 12345, {}, "processes.rdzv_id", 12345),
    ("rdzv_endpoint", "node0:29500", {}, "processes.rdzv_endpoint", "node0:29500"),
    ("master_addr", "node0", {}, "processes.master_addr", "node0"),
    ("master_port", 29500, {"master_addr": "node0"}, "processes.master_port", 29500),
    ("wandb_project", "p", {}, "monitoring.wandb_project", "p"),
    ("wandb_entity", "e", {}, "monitoring.wandb_entity", "e"),
    ("wandb_run_name", "r", {}, "monitoring.wandb_run_name", "r"),
    ("tensorboard_log_dir", "tb", {}, "monitoring.tensorboard", "tb"),
    ("mlflow_tracking_uri", "u", {}, "monitoring.mlflow_tracking_uri", "u"),
    ("mlflow_experiment_name", "e", {}, "monitoring.mlflow_experiment_name", "e"),
    ("mlflow_run_name", "r", {}, "monitoring.mlflow_run_name", "r"),
]


@pytest.mark.parametrize(("keyword", "value", "others", "path", "meant"), MEANINGS, ids=[row[0] for row in MEANINGS])
def test_a_keyword_gives_its_setting(keyword: str, value: Any, others: dict[str, Any], path: str, meant: Any):
    recipe = recipe_of(**{**others, keyword: value})
    if keyword == "data_path":
        assert [getattr(source, "path", source) for source in recipe.data.path or []] == ["a.jsonl", "b"]
        return
    assert value_at(recipe, path) == meant
    assert value_at(recipe_of(**others), path) != meant


def test_every_keyword_is_shown_above_but_the_one_that_changes_nothing():
    assert {row[0] for row in MEANINGS} == set(KEYWORDS) - {"use_liger"}


def test_use_liger_is_accepted_either_way_but_must_be_a_boolean():
    assert recipe_of(use_liger=True) == recipe_of(use_liger=False) == recipe_of()
    assert problems_of(use_liger="yes") == ["use_liger: found 'yes'; allowed: True or False. Write use_liger=False"]


def test_the_documented_defaults_of_the_contract_hold():
    recipe = recipe_of()
    assert recipe.backend == "instructlab-training"
    assert recipe.training.epochs == 1
    assert recipe.training.global_batch_size == 3840
    assert recipe.optimizer.lr == 2e-6
    assert recipe.training.max_seq_len == 4096
    assert recipe.training.max_tokens_per_gpu == 60000
    assert recipe.checkpoint.at_epoch


def test_defaults_of_a_contract_hold_only_under_it():
    recipe = recipe_of(backend="torch")
    changed = {path for path, value in INSTRUCTLAB.defaults.items() if value_at(recipe, path) == value}
    assert changed == {"training.max_seq_len"}  # the same by chance


def test_none_means_not_given():
    assert recipe_of(**{name: None for name in KEYWORDS if name not in NEEDED}) == recipe_of()


def test_steps_take_the_place_of_the_default_epochs_but_not_of_given_ones():
    assert recipe_of(max_steps=3).training.epochs is None
    assert len(problems_of(max_steps=3, num_epochs=1)) == 1


@pytest.mark.parametrize(
    ("full_state", "checkpoint", "saves"),
    [(None, None, True), (False, None, False), (None, False, False), (True, False, True), (False, True, True)],
)
def test_one_of_the_two_requests_for_a_checkpoint_at_each_epoch_is_enough(
    full_state: Any, checkpoint: Any, saves: bool
):
    recipe = recipe_of(accelerate_full_state_at_epoch=full_state, checkpoint_at_epoch=checkpoint)
    assert recipe.checkpoint.at_epoch is saves


def test_naming_a_tracker_switches_it_on():
    assert recipe_of(wandb_project="p", wandb_entity="e").monitoring.wandb
    assert recipe_of(mlflow_run_name="r").monitoring.mlflow
    assert not recipe_of().monitoring.wandb


@pytest.mark.parametrize("function", ["sft", "osft", "lora_sft"])
def test_a_function_may_be_a_metric_of_each_function(function):
    def shortness(answer: str, reference: str) -> float:
        return -len(answer)

    for metrics in (shortness, ["f1", shortness]):
        request = request_from({**NEEDED, "generate": 4, "metrics": metrics}, function)
        assert request.metrics == (shortness,)
        assert request.layer.values["evaluation.metrics"][-1] == "live:shortness"


def test_overrides_reach_every_setting():
    recipe = recipe_of(overrides={"data": {"turns": "unroll"}, "checkpoint.keep_last": None})
    assert recipe.data.turns == "unroll"
    assert recipe.checkpoint.keep_last is None


def test_everything_wrong_is_said_at_once_in_the_callers_words():
    found = problems_of(
        data_path=None,
        num_epochs=-1,
        lr_schedular="cosine",
        overlong="drop",
        max_seq_len=100_000,
        callbacks=[3],
        lr_scheduler_kwargs={"power": 2},
        overrides={"optimizer.lr": 1, "optimizer.learning": 1},
        learning_rate=1e-5,
        seed=1,
        random_seed=2,
    )
    assert found == [
        "callbacks: found 3; allowed: functions that take a StepReport.",
        "sft() has no parameter 'lr_schedular'. Did you mean lr_scheduler?",
        "sft() has no parameter 'overlong'. For the setting data.overlong write overrides={'data.overlong': ...}.",
        "optimizer.lr: given twice, as learning_rate and in overrides. Keep one.",
        "lr_scheduler_kwargs: found 'power'; allowed: a dictionary with some of min_lr, decay_ratio, warmup_ratio, "
        "warmup_steps. Write lr_scheduler_kwargs={'min_lr': 1e-7}",
        "seed: given twice, as seed and as random_seed. Keep one.",
        "optimizer.learning: not a setting of the recipe. Did you mean optimizer.lr?",
        "training.epochs (num_epochs): found -1; allowed: a number greater than 0, or null. Write num_epochs=1",
        "data.path (data_path): not given. Write data_path='FILE.jsonl'",
        "training.max_tokens_per_gpu (max_tokens_per_gpu): the `max_batch_len` cannot be less than `max_seq_len`: "
        "60000 tokens per device cannot hold a sample of 100000. Write max_tokens_per_gpu=100000, or lower "
        "training.max_seq_len (max_seq_len).",
    ]


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(
        RecipeError, match=r"backend: found 'toch'; known: instructlab-training, torch, jax\. Write backend: torch"
    ):
        recipe_from(
            layer_of({"backend": "toch", "model.path": "m", "output": "o", "data.path": "d"}),
            algorithm="sft",
            backend="torch",
        )


def test_an_unknown_algorithm_names_the_known_ones():
    with pytest.raises(
        RecipeError, match=r"algorithm: 'stf' is not known; known: sft, osft, lora_sft\. Did you mean 'sft'\?"
    ):
        recipe_from(Layer({"algorithm": "stf"}), algorithm="sft", backend="torch")


def test_rows_in_memory_are_told_from_names_of_rows():
    import datasets
    import pandas

    rows = [{"messages": []}]
    for live in (rows, tuple(rows), pandas.DataFrame(rows), datasets.Dataset.from_list(rows), iter(rows)):
        assert is_live(live)
    for name in ([], "a", Path("a"), ["a", Path("b")], [{"path": "a", "weight": 2}], {"train": rows}, None, 3):
        assert not is_live(name)


def test_rows_in_memory_stand_in_for_a_path():
    rows = [{"text": "a"}]
    request = request_from({**NEEDED, "data_path": rows, "validation_data_path": rows})
    assert request.rows is rows
    assert request.validation_rows is rows
    assert request.live == ("data.path", "data.validation")
    recipe = recipe_from(request.layer, algorithm="sft", backend="torch", live=request.live)
    assert recipe.data.path is None


def test_rows_in_memory_beside_a_path_are_an_error():
    rows = [{"text": "a"}]
    found = problems_of(data_path=rows, validation_data_path=rows, validation_split=0.1, overrides={"data.path": "d"})
    assert [line.split(":")[0] for line in found] == ["data.path", "data.validation_fraction"]


def test_a_mapping_of_splits_is_not_rows():
    found = problems_of(data_path={"train": [], "test": []})
    assert found[0] == "data_path: found a dict; allowed: a path, a list of paths, or rows. Hand over one split."


def test_numpy_numbers_are_numbers():
    assert recipe_of(num_epochs=np.int64(2), learning_rate=np.float64(1e-5)) == recipe_of(
        num_epochs=2, learning_rate=1e-5
    )


def test_one_callback_needs_no_list():
    assert request_from({**NEEDED, "callbacks": print}).watchers == (print,)
    assert problems_of(callbacks=3) == ["callbacks: found 3; allowed: functions that take a StepReport."]


def test_every_keyword_has_a_meaning_and_a_type():
    for keyword in KEYWORDS.values():
        assert keyword.meaning().endswith(".")
        assert isinstance(keyword.type(), type)
        assert not keyword.path or keyword.path in all_settings()

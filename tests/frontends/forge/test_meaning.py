"""What torchforge's keys say in a recipe, and what they are refused with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from training_hub.errors import RecipeError
from training_hub.frontends.forge.file import presets, wishes
from training_hub.frontends.forge.meaning import asked
from training_hub.frontends.forge.run import check, load, recipe_of, save, show
from training_hub.frontends.forge.schema import KEYS
from training_hub.recipe import Recipe
from training_hub.recipe.names import all_settings

TINY: dict[str, Any] = {"model": {"hf_assets_path": "${demo_model}"}}
ALONE: dict[str, str] = {}
"""The environment of a process that torchrun did not start."""


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(*assigned: str, environment: Mapping[str, str] = ALONE, gpus: int = 0) -> Recipe:
    return recipe_of(asked(wishes(TINY, assigned), lambda: gpus, environment))


def refused(*assigned: str, environment: Mapping[str, str] = ALONE) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(*assigned, environment=environment)
    return str(caught.value)


def test_what_is_not_given_has_the_defaults_of_torchtitan():
    found = recipe()
    assert (found.optimizer.lr, found.optimizer.beta2, found.optimizer.weight_decay) == (8e-4, 0.95, 0.1)
    assert (found.training.steps, found.training.max_seq_len, found.training.global_batch_size) == (10000, 2048, 8)
    assert (found.lr_scheduler.name, found.lr_scheduler.warmup_steps, found.training.max_norm) == ("linear", 200, 1.0)
    assert found.training.max_tokens_per_gpu == 8 * 2048
    assert found.training.activation_checkpointing == "selective"
    assert (found.checkpoint.interval, found.checkpoint.minutes, found.checkpoint.final) == (None, None, False)
    assert found.monitoring.console == "titan"
    assert found.comm.timeout_seconds == 100


def test_a_key_is_written_with_dashes_and_without_and_its_value_may_hold_an_equals_sign(tmp_path: Path):
    rows = tmp_path / "a=b.jsonl"
    rows.write_text('{"text": "x"}\n')
    assert recipe("--training.steps=10").training.steps == recipe("training.steps=10").training.steps == 10
    assert recipe(f"--training.dataset={rows}").data.path == str(rows)


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_whole_recipe(name: str):
    found = recipe_of(asked(wishes(load(name)), lambda: 8, ALONE))
    assert found.training.steps
    assert found.checkpoint.final


@pytest.mark.parametrize(
    ("typo", "near"),
    [
        ("training.step=5", "training.steps"),
        ("optimiser.lr=1e-5", "optimizer.lr"),
        ("parallelism.tensor_paralel_degree=2", "parallelism.tensor_parallel_degree"),
        ("checkpoint.intervall=5", "checkpoint.interval"),
        ("model.flavour=8B", "model.flavor"),
    ],
)
def test_a_misspelt_key_is_an_error_that_names_the_nearest(typo: str, near: str):
    assert f"{typo.partition('=')[0]}: not a key. Did you mean {near}?" in refused(typo)


OTHER = {bool: "true", int: "7", float: "7", str: "other", list: "[other]"}


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.only and not key.setting])
def test_what_a_key_cannot_do_here_is_refused_with_the_reason(name: str):
    key = KEYS[name]
    assert not refused_values(name, key.only[0])
    other = str(not key.only[0]).lower() if bool in key.kinds else OTHER[key.kinds[0]]
    line = refused(f"{name}={other}")
    assert f"{name}: found" in line
    assert key.reason in line


def refused_values(name: str, value: Any) -> list[str]:
    """The problems of a key with this value."""
    section, _, last = name.rpartition(".")
    nested: Any = {last: value}
    for part in reversed(section.split(".")):
        nested = {part: nested}
    return [line for line in asked(wishes(nested), environment=ALONE).layer.problems if line.startswith(name)]


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.setting])
def test_a_key_that_is_a_setting_names_one_and_its_default_is_valid_there(name: str):
    assert KEYS[name].setting in all_settings()
    recipe()  # with every default


def test_every_problem_is_told_at_once_in_the_words_of_the_file():
    said = refused("training.seq_len=0", "optimizer.lr=-1", "training.gc_freq=1", "comm.trace_buf_size=5")
    for name in ("(training.seq_len)", "optimizer.lr", "training.gc_freq", "comm.trace_buf_size"):
        assert f"{name}: found" in said


def test_blocks_are_compiled_and_keep_what_a_budget_allows():
    keeps = ("activation_checkpoint.mode=memory_budget", "activation_checkpoint.memory_budget=0.3")
    for key in ("training.compile=true", "compile.enable=true"):
        found = recipe(key, *keeps).training
        assert (found.compile, found.activation_checkpointing, found.activation_memory_budget) == (
            True,
            "memory_budget",
            0.3,
        )
    assert recipe("training.compile=true", "activation_checkpoint.mode=none").training.compile
    assert "Write activation_checkpoint.mode: memory_budget" in refused("training.compile=true")
    assert "activation_checkpoint.memory_budget" in refused("activation_checkpoint.memory_budget=0.3")


def test_a_value_of_a_wrong_kind_is_refused():
    assert "training.local_batch_size: found 'many'; allowed: a whole number" in refused(
        "training.local_batch_size=many"
    )
    assert "checkpoint.enable: found 1; allowed: true or false" in refused("checkpoint.enable=1")


def test_samples_of_a_step_are_those_of_each_process_times_the_processes():
    four = ("processes.procs=4", "training.local_batch_size=2")
    assert recipe(*four).training.global_batch_size == 8
    assert recipe(*four, "processes.hosts=2", "processes.rdzv_endpoint=a:1").training.global_batch_size == 16
    assert recipe(*four, "training.global_batch_size=24").training.global_batch_size == 24
    assert "allowed: -1, or a multiple of 8" in refused(*four, "training.global_batch_size=20")
    started = {"RANK": "0", "WORLD_SIZE": "3"}
    assert recipe("training.local_batch_size=2", environment=started).training.global_batch_size == 6
    assert recipe("processes.procs=gpu", gpus=4).training.global_batch_size == 32


def test_more_processes_than_a_host_can_have_are_meant_for_several_hosts():
    assert "write processes: {hosts: 4, procs: 8}" in refused("processes.procs=32")


def test_the_later_spelling_of_processes_is_the_same():
    assert recipe("actors.trainer.procs=2").processes.procs == 2
    assert "processes.procs: given twice" in str(
        asked(wishes({"actors": {"trainer": {"procs": 2}}, "processes": {"procs": 2}})).layer.problems
    )


@pytest.mark.parametrize("degree", ["tensor", "pipeline", "context", "expert"])
def test_a_degree_becomes_the_setting_of_the_recipe_or_is_refused_in_words(degree: str):
    name = f"parallelism.{degree}_parallel_degree"
    if KEYS[name].setting:
        assert KEYS[name].setting == name
    else:
        assert f"{name}: found 2; allowed: 1, since this version does not divide a model" in refused(f"{name}=2")


def test_a_micro_batch_of_stages_is_a_pack():
    two = ("parallelism.pipeline_parallel_degree=2", "processes.procs=4", "training.seq_len=128")
    found = recipe(*two, "parallelism.pipeline_parallel_microbatch_size=4")
    assert (found.training.max_tokens_per_gpu, found.training.global_batch_size) == (512, 16)
    assert recipe(*two).training.max_tokens_per_gpu == 128
    assert "allowed: 1, 2, 4, 8, which divide" in refused(*two, "parallelism.pipeline_parallel_microbatch_size=3")
    assert "would change nothing in one stage" in refused("parallelism.pipeline_parallel_microbatch_size=2")


def test_all_the_rest_may_share_out_the_data():
    assert recipe("parallelism.data_parallel_shard_degree=-1", "processes.procs=2").processes.procs == 2


def test_the_rate_falls_as_torchtitan_writes_it():
    found = recipe("lr_scheduler.min_lr_factor=0.1", "optimizer.lr=1e-4").lr_scheduler
    assert (found.name, found.min_lr) == ("linear", pytest.approx(1e-5))
    assert recipe("lr_scheduler.decay_type=cosine").lr_scheduler.name == "cosine"
    stable = recipe("lr_scheduler.decay_ratio=0.2").lr_scheduler
    assert (stable.name, stable.decay_ratio) == ("wsd", 0.2)
    assert "allowed: linear, cosine" in refused("lr_scheduler.decay_type=sqrt")
    assert "Write lr_scheduler.decay_type: linear" in refused(
        "lr_scheduler.decay_ratio=0.2", "lr_scheduler.decay_type=cosine"
    )


def test_settings_of_the_recipe_stand_beside_the_keys(chat_file: Path):
    found = recipe(
        f"training.dataset={chat_file}", "data.format=messages", "algorithm=lora_sft", "lora.r=4", "training.epochs=2"
    )
    assert (found.algorithm, found.lora.r, found.data.format) == ("lora_sft", 4, "messages")
    assert (found.training.epochs, found.training.steps) == (2, None), "the default of steps gives way"
    assert found.data.overlong == "drop"
    assert recipe(f"training.dataset={chat_file}", "data.overlong=error").data.overlong == "error"
    assert "training.max_seq_len: given twice, as training.seq_len and as training.max_seq_len" in refused(
        "training.seq_len=64", "training.max_seq_len=64"
    )


def test_c4_is_text_in_blocks_that_is_read_as_far_as_needed():
    for name, path, split in (("c4", "allenai/c4:en", "train"), ("c4_validation", "allenai/c4:en[validation]", None)):
        data = recipe(f"training.dataset={name}").data
        assert (data.path, data.pretraining, data.streaming, data.format) == (path, True, True, "text")
        assert split is None or data.split == split
    assert "Did you mean c4_test?" in refused("training.dataset=c4_tests")


def test_a_list_of_data_sets_is_a_mixture(chat_file: Path):
    listed = f"[{{path: {chat_file}, weight: 2}}, {{path: json, data_files: {chat_file}}}, {{path: a/b, name: c}}]"
    paths = recipe(f"training.datasets={listed}").data.path
    assert [source.path for source in paths] == [str(chat_file), str(chat_file), "a/b:c"]
    assert paths[0].weight == 2
    assert "entry 1: spilt is not known" in refused("training.datasets=[{path: a/b, spilt: train}]")


def test_validation_is_torchtitans_or_torchforges(chat_file: Path):
    titan = recipe(
        "validation.enable=true", f"validation.dataset={chat_file}", "validation.freq=5", "validation.steps=3",
        "validation.local_batch_size=4", "processes.procs=2",
    )  # fmt: skip
    assert (titan.data.validation, titan.evaluation.interval, titan.data.validation_samples) == (str(chat_file), 5, 24)
    forge = recipe(
        f"eval.datasets=[{{path: {chat_file}}}]", "eval.eval_every_n_steps=50", "eval.max_eval_steps=2",
        "training.local_batch_size=3",
    )  # fmt: skip
    assert (forge.data.validation, forge.evaluation.interval, forge.data.validation_samples) == (str(chat_file), 50, 6)
    assert "would change nothing without validation.enable" in refused("validation.freq=5")
    assert recipe("eval.datasets=[{path: a/b}, {path: c/d, split: test}]").data.validation == ["a/b", "c/d[test]"]
    assert "would be those of the first of 2 sets" in refused(
        "eval.datasets=[{path: a/b}, {path: c/d}]", "eval.max_eval_steps=2"
    )


def test_a_model_that_is_not_the_one_that_is_named_is_refused(tmp_path: Path):
    assert "model.flavor: 8B has 32 layers of width 4096, but" in refused("model.flavor=8B")
    assert "model.name: qwen3, but" in refused("model.name=qwen3")
    assert "Did you mean 70B?" in refused("model.flavor=7B") or "these are known: 8B, 70B" in refused("model.flavor=7B")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096})
    )
    assert recipe(f"model.hf_assets_path={tmp_path}", "model.flavor=8B").model.path == str(tmp_path)


def test_a_family_and_a_size_without_a_path_are_a_model_on_the_hub():
    found = recipe_of(asked(wishes({"model": {"name": "qwen3", "flavor": "8B"}}), environment=ALONE))
    assert found.model.path == "Qwen/Qwen3-8B"


def test_weights_and_tokenizer_may_come_from_two_places(tmp_path: Path):
    found = recipe(f"checkpoint.initial_load_path={tmp_path}", "checkpoint.initial_load_in_hf=true")
    assert found.model.path == str(tmp_path)
    assert found.model.tokenizer.endswith("demo/model")
    assert "Write checkpoint.initial_load_in_hf: true" in refused(f"checkpoint.initial_load_path={tmp_path}")


def test_a_checkpoint_is_gone_on_from_only_if_it_is_the_newest_of_this_run(tmp_path: Path):
    for step in (2, 10):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    here = f"checkpoint.folder={tmp_path}"
    assert recipe(here, f"checkpoint.initial_load_path={tmp_path}/step_10/").output == str(tmp_path)
    assert "step 2 is not the newest" in refused(here, f"checkpoint.initial_load_path={tmp_path}/step_2/")
    assert "no checkpoint of step 3" in refused(here, f"checkpoint.initial_load_path={tmp_path}/checkpoints/step-3")
    assert "is a checkpoint of the run in" in refused(f"checkpoint.initial_load_path={tmp_path}/step_10/")


def test_references_are_filled_in_and_wrong_ones_are_errors():
    config = {"model_name": "Qwen/Qwen3-8B", "model": {"hf_assets_path": "hf://${model_name}"}}
    found = recipe_of(asked(wishes(config), environment=ALONE))
    assert found.model.path == "Qwen/Qwen3-8B"
    config["model"] = {"hf_assets_path": "hf://${modelname}"}
    with pytest.raises(RecipeError, match=r"\$\{modelname\} names nothing in this file. Did you mean model_name"):
        recipe_of(asked(wishes(config), environment=ALONE))


def test_trackers_are_asked_for_as_torchforge_writes_it():
    found = recipe("metric_logging.wandb.project=mine", "metrics.log_freq=5").monitoring
    assert (found.wandb, found.wandb_project, found.log_interval) == (True, "mine", 5)
    assert "metric_logging.wandb.group: found 'a'" in refused("metric_logging.wandb.group=a")


def test_a_job_is_submitted_by_others(monkeypatch: pytest.MonkeyPatch):
    assert "training-hub slurm submit" in refused("provisioner.launcher=slurm")
    assert recipe("provisioner.launcher=slurm", environment={"SLURM_JOB_ID": "7"}).processes.procs == 1
    assert "allowed: null, slurm" in refused("provisioner.launcher=mast")


def test_a_configuration_is_saved_only_if_it_is_right(tmp_path: Path):
    config = {**TINY, "training": {"steps": 3}}
    file = save(config, tmp_path / "own.yaml")
    assert check(load(str(file))) == check(config)
    assert file.read_text() == show(config)
    with pytest.raises(RecipeError, match=r"training\.stepz"):
        save({**TINY, "training": {"stepz": 3}}, tmp_path / "wrong.yaml")
    assert not (tmp_path / "wrong.yaml").exists()


def test_an_unknown_file_is_answered_with_the_presets(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"no preset of this name: .*tiny.*Did you mean --config llama3_8b"):
        load("lama3_8b")
    with pytest.raises(RecipeError, match="no preset of this name"):
        load(str(tmp_path / "llama3_8b.yaml"))


def test_a_configuration_can_be_written_as_a_recipe_for_any_other_command(tmp_path: Path):
    from training_hub.frontends.cli import main
    from training_hub.frontends.cli import recipe_of as recipe_of_words

    file = tmp_path / "recipe.yaml"
    words = [
        "--config",
        "tiny",
        "provisioner.launcher=slurm",
        "processes.hosts=2",
        "processes.rdzv_endpoint=node0:29500",
    ]
    assert main(["forge", *words, "--recipe", str(file)]) == 0
    written = recipe_of_words(["sft", "--config", str(file)])
    assert written == recipe_of(asked(wishes(load("tiny"), words[2:]), environment={"SLURM_JOB_ID": "7"}))
    assert (written.processes.nodes, written.training.global_batch_size) == (2, 8)

"""What the fields of SFTConfig say in a recipe: in EasyDeL's names, in TRL's, as flags; and what is refused."""

from __future__ import annotations

import ast
import copy
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import training_hub as ed
from training_hub import RecipeError, SFTConfig, SFTTrainer
from training_hub.frontends.trainer.command import flag_parser, trainer_arguments
from training_hub.frontends.trainer.fields import FIELDS, KNOWN
from training_hub.frontends.trainer.refused import REFUSED
from training_hub.recipe import Recipe
from training_hub.recipe.names import all_settings

ROWS = [{"text": "one"}, {"text": "two"}]
CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


def page(rows: Any = ROWS, **fields: Any) -> Recipe:
    """The recipe in the style of EasyDeL's page."""
    return SFTTrainer(arguments=SFTConfig(**fields), model="tiny", train_dataset=rows).recipe


def trl(rows: Any = ROWS, **fields: Any) -> Recipe:
    return SFTTrainer(args=SFTConfig(**{"output_dir": "out", **fields}), model="tiny", train_dataset=rows).recipe


def said(make: Any, **fields: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make(**fields)
    return str(caught.value)


def test_arguments_have_the_defaults_of_the_page_and_args_those_of_trl():
    ours, theirs = page(), trl()
    assert (ours.training.global_batch_size, theirs.training.global_batch_size) == (16, 8)
    assert (ours.training.epochs, theirs.training.epochs) == (3, 3)
    assert (ours.optimizer.lr, theirs.optimizer.lr) == (2e-5, 2e-5)
    assert (ours.lr_scheduler.name, theirs.lr_scheduler.name) == ("constant", "linear")
    assert (ours.optimizer.weight_decay, theirs.optimizer.weight_decay) == (0.01, 0.0)
    assert (ours.training.max_seq_len, theirs.training.max_seq_len) == (4096, 1024)
    assert (ours.data.overlong, theirs.data.overlong) == ("truncate", "truncate")
    assert (ours.data.start_token, theirs.data.start_token) == (False, True)
    assert (ours.checkpoint.interval, theirs.checkpoint.interval) == (None, 500)
    assert (ours.output, theirs.output) == ("EasyDeL-Checkpoints/SFTTrainer", "out")
    assert ours.optimizer.beta2 == theirs.optimizer.beta2 == 0.999


@pytest.mark.parametrize(
    ("fields", "path", "value"),
    [
        ({"save_directory": "a", "model_name": "b"}, "output", "a/b"),
        ({"total_batch_size": 4, "gradient_accumulation_steps": 8}, "training.global_batch_size", 32),
        ({"max_length": 128}, "training.max_seq_len", 128),
        ({"max_sequence_length": 64, "max_length": 64}, "training.max_seq_len", 64),
        ({"max_training_steps": 7}, "training.steps", 7),
        ({"add_special_tokens": True}, "data.start_token", True),
        ({"dataset_num_proc": 2}, "data.workers", 2),
        ({"dataset_batch_size": 10}, "data.chunk_rows", 10),
        ({"dataset_kwargs": {"append_concat_token": False}}, "data.end_token", False),
        ({"dataset_kwargs": {"add_special_tokens": True}}, "data.start_token", True),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "data.format", "tokens"),
        ({"num_of_sequences": 10, "chars_per_token": 2, "max_length": 100}, "data.chunk_bytes", 2000),
        ({"packing": True, "eval_packing": False}, "data.validation_packing", False),
        ({"packing_strategy": "bfd_split"}, "data.overlong", "split"),
        ({"packing_strategy": "wrapped"}, "data.pretraining", True),
        ({"learning_rate_end": 1e-6}, "lr_scheduler.name", "linear"),
        ({"learning_rate_end": 1e-6, "scheduler": "cosine"}, "lr_scheduler.min_lr", 1e-6),
        ({"scheduler": ed.EasyDeLSchedulers.NONE}, "lr_scheduler.name", "constant"),
        ({"scheduler": ed.EasyDeLSchedulers.LINEAR}, "lr_scheduler.name", "linear"),
        ({"optimizer": ed.EasyDeLOptimizers.MUON}, "optimizer.name", "Muon"),
        ({"optimizer": ed.EasyDeLOptimizers.LION}, "optimizer.name", "Lion"),
        ({"optimizer": "ADAFACTOR"}, "optimizer.name", "Adafactor"),
        ({"extra_optimizer_kwargs": {"b1": 0.8}}, "optimizer.beta1", 0.8),
        ({"clip_grad": 0.5}, "training.max_norm", 0.5),
        ({"loss_config": {"z_loss": 1e-4}}, "loss.z_loss", 1e-4),
        ({"frozen_parameters": "lm_head"}, "freezing.weights", ["lm_head"]),
        ({"frozen_blocks": 1}, "freezing.blocks", 1),
        ({"train_on_inputs": True}, "data.unmask", True),
        ({"do_last_save": False}, "checkpoint.final", False),
        ({"save_interval_minutes": None}, "checkpoint.minutes", None),
        ({"save_total_limit": None}, "checkpoint.keep_last", None),
        ({"save_total_limit": 2}, "checkpoint.keep_last", 2),
        ({"resume_if_possible": False}, "checkpoint.resume", "restart"),
        ({"shuffle_train_dataset": False}, "data.shuffle", False),
        ({"shuffle_seed_train": 3}, "seed", 3),
        ({"log_steps": 4}, "monitoring.log_interval", 4),
        ({"verbose": False}, "monitoring.console", "off"),
        ({"gradient_checkpointing": ed.EasyDeLGradientCheckPointers.NOTHING_SAVEABLE},
         "training.activation_checkpointing", "full"),
        ({"gradient_checkpointing": "checkpoint_dots"}, "training.activation_checkpointing", "selective"),
        ({"overrides": {"data.turns": "last"}}, "data.turns", "last"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_field_of_easydel_is_a_setting(fields: dict[str, Any], path: str, value: Any):
    assert _at(page(**fields), path) == value


@pytest.mark.parametrize(
    ("fields", "path", "value"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, "training.global_batch_size", 6),
        ({"max_steps": 5}, "training.steps", 5),
        ({"max_steps": -1, "num_train_epochs": 2}, "training.epochs", 2),
        ({"max_length": None}, "data.overlong", "error"),
        ({"warmup_ratio": 0.1}, "lr_scheduler.warmup_ratio", 0.1),
        ({"warmup_steps": 0.1}, "lr_scheduler.warmup_ratio", 0.1),
        ({"warmup_steps": 10}, "lr_scheduler.warmup_steps", 10),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
         "lr_scheduler.min_lr", pytest.approx(2e-6)),
        ({"optim": "lion_32bit"}, "optimizer.name", "Lion"),
        ({"adam_beta2": 0.95}, "optimizer.beta2", 0.95),
        ({"max_grad_norm": 0.3}, "training.max_norm", 0.3),
        ({"bf16": True}, "model.dtype", "bfloat16"),
        ({"bf16": False}, "model.dtype", "float32"),
        ({"fp16": True}, "model.dtype", "auto"),
        ({"gradient_checkpointing": True}, "training.activation_checkpointing", "full"),
        ({"completion_only_loss": False}, "data.unmask", True),
        ({"assistant_only_loss": False}, "data.unmask", True),
        ({"loss_type": "dft"}, "loss.dft", True),
        ({"neftune_noise_alpha": 5.0}, "loss.neftune_noise_alpha", 5.0),
        ({"label_smoothing_factor": 0.1}, "loss.label_smoothing", 0.1),
        ({"train_sampling_strategy": "sequential"}, "data.shuffle", False),
        ({"save_strategy": "epoch"}, "checkpoint.at_epoch", True),
        ({"save_strategy": "no"}, "checkpoint.minutes", None),
        ({"save_steps": 20}, "checkpoint.interval", 20),
        ({"logging_steps": 3}, "monitoring.log_interval", 3),
        ({"report_to": "tensorboard"}, "monitoring.tensorboard", True),
        ({"report_to": ["tensorboard"], "logging_dir": "logs"}, "monitoring.tensorboard", "logs"),
        ({"report_to": "wandb", "run_name": "r"}, "monitoring.wandb_run_name", "r"),
        ({"report_to": "none"}, "monitoring.wandb", False),
        ({"disable_tqdm": True}, "monitoring.console", "plain"),
        ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, "model.dtype", "bfloat16"),
        ({"model_init_kwargs": {"attn_implementation": "sdpa"}}, "model.attention", "documents"),
        ({"push_to_hub": True, "hub_model_id": "me/x", "hub_private_repo": False}, "hub.private", False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_field_of_trl_is_a_setting(fields: dict[str, Any], path: str, value: Any):
    assert _at(trl(**fields), path) == value


def _at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


def test_evaluation_comes_when_it_is_asked_for():
    def made(style: str, **fields: Any) -> Recipe:
        config = SFTConfig(**fields)
        return SFTTrainer(**{style: config}, model="tiny", train_dataset=ROWS, eval_dataset=ROWS).recipe  # type: ignore[arg-type]

    assert made("arguments").evaluation.at_epoch, "as the page has it: there is an evaluation set"
    assert not made("arguments", do_eval=False).evaluation.at_epoch
    assert made("arguments", evaluation_steps=5).evaluation.interval == 5
    assert not made("args", output_dir="out").evaluation.at_epoch, "TRL measures nothing by itself"
    assert made("args", output_dir="out", eval_strategy="epoch").evaluation.at_epoch
    assert made("args", output_dir="out", eval_strategy="steps", eval_steps=3).evaluation.interval == 3
    assert made("args", output_dir="out", eval_strategy="steps", logging_steps=7).evaluation.interval == 7
    best = made("args", output_dir="out", eval_strategy="epoch", load_best_model_at_end=True,
                metric_for_best_model="eval_loss", greater_is_better=False)  # fmt: skip
    assert (best.checkpoint.keep_best, best.evaluation.best_metric, best.evaluation.best_mode) == (True, "loss", "min")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"learning_rat": 1}, "learning_rat: not a field of SFTConfig. Did you mean learning_rate?"),
        ({"lr": 1}, "Did you mean learning_rate?"),
        ({"max_seq_length": 3}, "Did you mean max_length?"),
        ({"evaluation_strategy": "no"}, "Did you mean eval_strategy?"),
        ({"turns": "unroll"}, "For the setting data.turns write overrides={'data.turns': ...}"),
        ({"optimizer": ed.EasyDeLOptimizers.MARS}, "optimizer: found 'mars'; allowed: 'adafactor', 'adamw'"),
        ({"scheduler": "step"}, "lr_scheduler.name (scheduler): found 'step'"),
        ({"truncation_mode": "keep_end"}, "allowed: keep_start"),
        ({"packing_strategy": "best"}, "allowed: bfd, bfd_split, wrapped"),
        ({"dataset_kwargs": {"shuffle": True}}, "dataset_kwargs: found 'shuffle'; allowed"),
        ({"dataset_batch_size": 0}, "data.chunk_rows (dataset_batch_size): found 0"),
        ({"num_of_sequences": 0}, "num_of_sequences: found 0; allowed: a number greater than 0"),
        ({"total_batch_size": 0}, "total_batch_size: found 0; allowed: a whole number of at least 1"),
        ({"total_batch_size": 4, "per_device_train_batch_size": 4}, "two names of the batch size. Keep one"),
        ({"max_length": 1, "max_sequence_length": 2}, "two names of the longest sample. Keep one"),
        ({"output_dir": "a", "save_directory": "b"}, "two ways to name the folder of the run. Keep one"),
        ({"scheduler": "cosine", "lr_scheduler_type": "cosine"}, "two names of the schedule. Keep one"),
        ({"learning_rate": "fast"}, "optimizer.lr (learning_rate): found 'fast'; allowed: a number greater than 0"),
        ({"learning_rate_end": 1.0}, "lr_scheduler.min_lr (learning_rate_end): found 1.0; allowed: at most"),
        ({"backend": "tpu"}, "'jax' is the engine that reaches TPUs"),
        ({"backend": "torhc"}, "backend: found 'torhc'; known: instructlab-training, torch"),
        ({"quantization_mode": "nf4"}, "quantization_mode: found 'nf4'; weights are quantised where they are frozen"),
        ({"step_start_point": 5}, "a run goes on from its newest whole checkpoint"),
        ({"hub_token": "hf_secret"}, "hub_token: found a value; a secret"),
        ({"generation_interval": 10}, "answers are made by evaluation.generate"),
        ({"deepspeed": "ds.json"}, "deepspeed: found 'ds.json'; the engine here shards by its own means"),
        ({"assistant_only_loss": True}, "in which nobody is the assistant"),
        ({"do_eval": True}, "do_eval: True, but eval_dataset is not given"),
        (
            {"overrides": {"optimizer.lr": 1e-3}, "learning_rate": 1e-4},
            "given twice, as learning_rate and in overrides",
        ),
        ({"eval_strategy": "epoch", "eval_steps": 3}, "eval_steps: would change nothing"),
        ({"save_strategy": "epoch", "save_steps": 3}, "save_steps: would change nothing"),
        ({"run_name": "a"}, "run_name: would change nothing without report_to"),
        ({"report_to": "comet"}, "report_to: found 'comet'; allowed: none, wandb, tensorboard, mlflow"),
        ({"wandb_name": "a"}, "monitoring.wandb_run_name (wandb_name): a would change nothing while"),
        ({"chat_template_path": "/"}, "holds no chat_template.jinja"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_says_what_to_write(fields: dict[str, Any], line: str):
    assert line in said(page, **fields)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        SFTConfig(learning_rat=1, fsdp="full_shard", optimizer="quad")
    assert len(caught.value.problems) == 3
    with pytest.raises(RecipeError) as caught:
        SFTTrainer(args=SFTConfig(max_steps=0, eval_steps=0), compute_loss_func=len, optimizers=(1, 2))
    lines = "\n".join(caught.value.problems)
    for part in ("compute_loss_func", "optimizers", "training.steps (max_steps): found 0",
                 "evaluation.interval (eval_steps): found 0", "model.path (model): not given",
                 "data.path (train_dataset): not given", "output (output_dir): not given"):  # fmt: skip
        assert part in lines
    assert not any("hf_secret" in line for line in caught.value.problems)


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_is_not_here_is_taken_where_it_asks_for_nothing_and_else_refused(name: str):
    for value in REFUSED[name].off:
        assert SFTConfig(**{name: value}).given == {}
    assert getattr(SFTConfig(), name) == REFUSED[name].off[0]
    with pytest.raises(RecipeError, match=f"^{name}: found"):
        SFTConfig(**{name: "something else"})
    assert REFUSED[name].why.endswith(".")


@pytest.mark.parametrize("name", KNOWN)
def test_every_field_says_what_it_means_and_leads_to_a_setting(name: str):
    field = KNOWN[name]
    assert field.path == "" or field.path in {*all_settings(), "backend"}
    assert field.doc or field.path, name
    assert (field.doc or field.meaning()).endswith((".", "}."))


def test_every_field_of_trl_is_known():
    """Read from its source, which takes no import of it; of transformers in any case."""
    found: set[str] = set()
    for package, file, name in (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
    ):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        found |= {
            node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    assert len(found) > 100
    assert sorted(found - {*KNOWN, *REFUSED}) == []


def test_a_configuration_can_be_read_changed_copied_and_compared():
    config = SFTConfig("out", learning_rate=1e-4, optimizer=ed.EasyDeLOptimizers.LION)
    assert (config.output_dir, config.learning_rate, config.num_train_epochs) == ("out", 1e-4, 3)
    config.num_train_epochs = 2
    assert config.given["num_train_epochs"] == 2
    with pytest.raises(RecipeError, match="Did you mean num_train_epochs"):
        config.num_train_epoch = 2
    with pytest.raises(AttributeError, match="Did you mean learning_rate"):
        _ = config.learning_rat
    other = copy.deepcopy(config)
    assert other == config and other is not config
    assert config.replace(seed=1) != config
    assert config.to_dict()["optimizer"] == "lion"
    assert "learning_rate" in inspect.signature(SFTConfig).parameters
    assert "learning_rate=0.0001" in repr(config)


def test_the_configuration_of_transformers_is_taken():
    from transformers import TrainingArguments

    theirs = TrainingArguments(output_dir="there", learning_rate=1e-4, max_steps=3, report_to=["none"], use_cpu=False)
    recipe = SFTTrainer(model="tiny", args=theirs, train_dataset=ROWS).recipe
    assert (recipe.output, recipe.optimizer.lr, recipe.training.steps) == ("there", 1e-4, 3)
    assert SFTTrainer(model="a/tiny", train_dataset=ROWS).recipe.output == "tiny-SFT", "as TRL names it"
    with pytest.raises(RecipeError, match=r"model: found an SFTConfig\. Write SFTTrainer"):
        SFTTrainer(SFTConfig(), None, "tiny")
    with pytest.raises(RecipeError, match="arguments: found a int"):
        SFTTrainer(model="tiny", args=3, train_dataset=ROWS)


def test_flags_and_python_are_one_recipe(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    flags = (
        f"--repo-id tiny --dataset_name {rows} --packing --total_batch_size=4 --learning_rate 1e-4 --no-do_last_save "
        "--scheduler cosine --attn_mechanism flash_attn2 --dtype bfloat16 --param_dtype float32 --max_length 64 "
        "--sharding_axis 1,-1,1,1,1 --save_total_limit None --frozen_parameters [lm_head,embed]"
    )
    of_flags = SFTTrainer(**trainer_arguments(flags.split())).recipe
    model = ed.AutoEasyDeLModelForCausalLM.from_pretrained(
        "tiny", dtype="bfloat16", param_dtype="float32", config_kwargs={"attn_mechanism": "flash_attn2"}
    )
    config = SFTConfig(
        packing=True, total_batch_size=4, learning_rate=1e-4, do_last_save=False, scheduler="cosine", max_length=64,
        save_total_limit=None, frozen_parameters=["lm_head", "embed"],
    )  # fmt: skip
    assert of_flags == SFTTrainer(arguments=config, model=model, train_dataset=str(rows)).recipe
    assert (of_flags.model.attention, of_flags.model.save_dtype) == ("varlen", "float32")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--learning_rat 1", "--learning_rat: not a flag. Did you mean --learning_rate?"),
        ("--packing maybe", "data.packing (packing): found 'maybe'"),
        ("--dataset_name x", "--repo_id: not given"),
        ("--repo_id m --dtype float16", "--dtype: found 'float16'; allowed: float32, bfloat16"),
        ("--repo_id m --attn_mechanism ring", "--attn_mechanism: found 'ring'; allowed: auto, vanilla"),
        ("--repo_id m --sharding_axis 1,1,-1,1,1", "--sharding_axis: ep is -1"),
        ("--repo_id m --sharding_axis 1,-1,1,-1,1", "--sharding_axis: found (1, -1, 1, -1, 1); allowed: -1 once"),
        ("--repo_id m --sharding_axis 1,x", "--sharding_axis: found '1,x'"),
        ("--repo_id m --esurge_page_size 64", "--esurge_page_size: found 64; answers are made by"),
        ("--no_packing true", "--no_packing: takes no value"),
    ],
)
def test_flags_that_are_wrong_say_what_to_write(words: str, line: str):
    with pytest.raises(RecipeError) as caught:
        SFTTrainer(**trainer_arguments([*words.split(), *("--repo_id m".split() if "packing maybe" in words else [])]))
    assert line in str(caught.value)


def test_the_help_page_has_every_field():
    text = flag_parser().format_help()
    assert [field.name for field in FIELDS if f"--{field.name}" not in text and field.name != "overrides"] == []
    assert "esurge" not in text, "what is not here is not shown"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"precision": "highest"}, "Write dtype='float32'"),
        ({"sharding_axis_dims": (1, 1)}, "allowed: a length for each of dp, fsdp, ep, tp, sp"),
        ({"sharding_axis_names": ("x",), "sharding_axis_dims": (1,)}, "sharding_axis_names: found 'x'"),
        ({"config_kwargs": {"attn_mecanism": "auto"}}, "Did you mean attn_mechanism?"),
        ({"config_kwargs": {"attn_softmax_dtype": "bfloat16"}}, "allowed: float32, which it always is"),
        ({"backend": ed.EasyDeLBackends.GPU}, "backend: found 'gpu'; allowed: torch, jax"),
        ({"platform": ed.EasyDeLPlatforms.TRITON}, "platform: found 'triton'"),
        ({"partition_rules": [1]}, "partition_rules: found [1]; which weight goes along which axis"),
        ({"quantization_config": 8}, "quantization_config: found 8; allowed: BitsAndBytesConfig"),
        ({"torch_dtype": "float32"}, "Did you mean dtype?"),
        ({"token": "x"}, "HF_TOKEN"),
        ({"device": "cuda:1"}, "the engine takes the device that it finds"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_loading_refuses_what_it_cannot_do(options: dict[str, Any], line: str):
    assert line in said(ed.AutoEasyDeLModelForCausalLM.from_pretrained, pretrained_model_name_or_path="tiny", **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "torch", "numpy"])
def test_formats_of_numbers_are_taken_as_each_library_has_them(dtype: str):
    import numpy
    import torch

    given: Any = {"torch": torch.bfloat16, "numpy": numpy.dtype("float32")}.get(dtype, dtype)
    model = ed.AutoEasyDeLModelForCausalLM.from_pretrained("tiny", dtype=given, param_dtype=numpy.float32)
    assert model.settings["model.dtype"] == ("float32" if dtype == "numpy" else "bfloat16")
    assert model.settings["model.save_dtype"] == "float32"


def test_a_mesh_is_spelled_as_in_easydel(monkeypatch: pytest.MonkeyPatch):
    load = ed.AutoEasyDeLModelForCausalLM.from_pretrained
    shard = "parallelism.data_parallel_shard_degree"
    assert load("tiny").settings == {}, "one process: there is nothing to divide"
    assert load("tiny", sharding_axis_dims=(1, 2, 1, 1, 1)).settings == {shard: 2}
    jax = load("tiny", backend="jax", sharding_axis_dims=(2, -1, 1, 2, 2)).settings
    degrees = {"data_parallel_replicate": 2, "data_parallel_shard": -1, "tensor_parallel": 2, "context_parallel": 2}
    assert jax == {"backend": "jax", **{f"parallelism.{name}_degree": length for name, length in degrees.items()}}
    rest = load("tiny", backend="jax", sharding_axis_dims=(1, 1, 1, 1, -1)).settings
    assert rest == {"backend": "jax", "parallelism.context_parallel_degree": -1}
    both = load("tiny", sharding_axis_dims=(1, 2, 4, 1, 1)).settings
    assert both == {shard: 8, "parallelism.expert_parallel_degree": 4}, "experts lie on devices that divide weights"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load("tiny").settings == {shard: -1}, "as in EasyDeL all that is left"
    assert load("tiny", auto_shard_model=False).settings == {}


def test_what_a_model_is_loaded_with_is_not_said_again():
    model = ed.AutoEasyDeLModelForCausalLM.from_pretrained("tiny", dtype="float32")
    with pytest.raises(RecipeError, match="given twice, as dtype of the model and as bf16"):
        SFTTrainer(model=model, args=SFTConfig("out", bf16=True), train_dataset=ROWS)
    lora = model.apply_lora_to_layers(8, ".*q_proj")
    recipe = SFTTrainer(model=lora, arguments=SFTConfig(), train_dataset=ROWS).recipe
    assert (recipe.algorithm, recipe.lora.r, recipe.lora.target_modules) == ("lora_sft", 8, ".*q_proj")

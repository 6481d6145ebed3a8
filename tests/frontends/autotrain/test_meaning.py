"""What AutoTrain's names say in a recipe, in Python, as flags and in its file: the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training_hub import LLMTrainingParams, RecipeError
from training_hub.frontends.autotrain.command import GROUPS, config_of, flag_of
from training_hub.frontends.autotrain.meaning import OPTIMIZERS, asked
from training_hub.frontends.autotrain.run import recipe_of
from training_hub.recipe import Recipe

# The guide's tables of parameters: name -> default.
GUIDE: dict[str, Any] = {
    "text_column": "text", "trainer": "sft", "epochs": 3, "batch_size": 8, "lr": 5e-5, "warmup_ratio": 0.1,
    "gradient_accumulation": 4, "optimizer": "adamw_torch", "scheduler": "linear", "weight_decay": 0.0,
    "max_grad_norm": 1.0, "max_seq_length": 2048, "padding": "right", "chat_template": None, "add_eos_token": True,
    "block_size": -1, "peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
    "target_modules": "all-linear", "merge_adapter": False, "quantization": None, "mixed_precision": None,
    "use_flash_attention_2": False, "disable_gradient_checkpointing": False, "unsloth": False, "packing": False,
}  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "train.csv"
    path.parent.mkdir()
    path.write_text('text,more\n"one, two",1\nthree,2\n')
    return path


def recipe(texts: Path, **values: Any) -> Recipe:
    given = {"model": "tiny", "data_path": str(texts), "project_name": "out", **values}
    return recipe_of(asked(LLMTrainingParams(**given)))


def problems(texts: Path, **values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        recipe(texts, **values)
    return str(caught.value)


@pytest.mark.parametrize("name", GUIDE)
def test_the_guides_defaults_are_the_defaults(name: str):
    assert getattr(LLMTrainingParams(), name) == GUIDE[name]


def test_the_guides_defaults_in_a_recipe(texts: Path):
    found = recipe(texts)
    assert (found.algorithm, found.training.epochs, found.training.global_batch_size) == ("sft", 3, 32)
    assert (found.optimizer.name, found.optimizer.lr, found.optimizer.weight_decay) == ("AdamW", 5e-5, 0)
    assert (found.optimizer.beta1, found.optimizer.beta2) == (0.9, 0.999), "as transformers has them"
    assert (found.lr_scheduler.name, found.lr_scheduler.warmup_ratio) == ("linear", 0.1)
    assert (found.training.max_norm, found.training.max_seq_len, found.data.overlong) == (1.0, 2048, "truncate")
    assert (found.data.format, found.data.columns, found.data.end_token) == ("text", {}, True)
    assert found.data.packing is True, "not said: what is fastest"


def test_flags_file_and_python_are_one_recipe(texts: Path, tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(
        "task: llm-sft\nbase_model: tiny\nproject_name: out\nlog: none\nbackend: local\n"
        f"data: {{path: {texts}, train_split: train, valid_split: null, chat_template: null,\n"
        "  column_mapping: {text_column: more}}\n"
        "params: {lr: 1.0e-4, packing: false, epochs: 2, warmup_ratio: 0.2}\n"
        "hub: {username: '${USER}', token: '${HF_TOKEN}', push_to_hub: false}\n"
    )
    flags = f"--train --trainer sft --model tiny --data-path {texts} --text_column=more --project-name out --lr 1e-4"
    flags += " --no-packing --epochs 2 --warmup-ratio 0.2"
    of_flags, of_file = (config_of(words.split())[0] for words in (flags, f"--config {file}"))
    of_python = recipe(texts, text_column="more", lr=1e-4, packing=False, epochs=2, warmup_ratio=0.2)
    assert recipe_of(asked(of_flags)) == recipe_of(asked(of_file)) == of_python
    assert of_python.data.columns == {"text": "more"}


def test_flags_win_over_the_file(texts: Path, tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(f"base_model: tiny\nproject_name: out\ndata: {{path: {texts}}}\nparams: {{lr: 1.0e-4}}\n")
    assert config_of(["--config", str(file), "--lr", "2e-4"])[0].lr == 2e-4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: llm-dpo\n", "task: found 'llm-dpo'; allowed: llm-sft"),
        ("backend: spaces-a10\n", "backend: found 'spaces-a10'; runs are on this machine"),
        ("params: {learning_rate: 1}\n", r"params.learning_rate: not a parameter. Did you mean lr\?"),
        ("sweep: {}\n", "sweep: not a key"),
        ("data: rows.csv\n", "data: found 'rows.csv'; a mapping is wanted"),
        ("hub: {token: hf_abc}\n", "hub.token: a secret, which no file is to hold"),
        ("data: {column_mapping: {text: t}}\n", "data.column_mapping.text: not a key; known: text_column"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(text: str, said: str, tmp_path: Path):
    (tmp_path / "run.yml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        config_of(["--config", str(tmp_path / "run.yml")])


@pytest.mark.parametrize("name", [n for n, f in LLMTrainingParams.model_fields.items() if "bool" in str(f.annotation)])
def test_every_boolean_can_be_turned_on_and_off(name: str):
    flag = flag_of(name)
    for words, wanted in (([flag], True), ([f"--no-{flag[2:]}"], False), ([f"{flag}=false"], False)):
        assert getattr(config_of(words)[0], name) is wanted
    assert getattr(config_of([flag.replace("-", "_").replace("__", "--")])[0], name) is True


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_name_of_an_optimizer_is_one_of_ours(name: str, texts: Path):
    found = recipe(texts, optimizer=name, scheduler="constant")
    assert found.optimizer.name == OPTIMIZERS[name]


def test_schedules_by_the_names_of_transformers(texts: Path):
    assert recipe(texts, scheduler="constant").lr_scheduler.warmup_ratio is None
    assert recipe(texts, scheduler="constant_with_warmup").lr_scheduler.warmup_ratio == 0.1
    assert "Write scheduler constant_with_warmup" in problems(texts, scheduler="constant", warmup_ratio=0.2)


def test_one_length_by_three_names(texts: Path):
    assert recipe(texts, block_size=128).training.max_seq_len == 128
    assert recipe(texts, model_max_length=64, block_size=-1).training.max_seq_len == 64
    assert recipe(texts, max_seq_length=64, block_size=64).training.max_seq_len == 64
    assert "these are names of one length" in problems(texts, max_seq_length=64, block_size=32)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"unsloth": True}, "unsloth: Unsloth replaces the model's code on an NVIDIA GPU, needs the package unsloth"),
        ({"distributed_backend": "deepspeed"}, "Write ddp, or leave it out"),
        ({"trainer": "dpo"}, "trainer: found 'dpo'; only sft is here"),
        ({"trainer": "distillation"}, "Write trainer sft with use_distillation"),
        ({"optimizer": "paged_ademamix_8bit"}, "found 'paged_ademamix_8bit'; allowed: one of adamw_torch"),
        ({"optimizer": "apollo"}, "optimizer: found 'apollo'; allowed: one of adamw_torch"),
        ({"lora_r": 8}, "lora_r: 8 would change nothing without peft"),
        ({"quantization": "int4"}, "quantization: 'int4' would change nothing without peft"),
        ({"merge_adapter": True}, "merge_adapter: true would change nothing without peft"),
        ({"distill_alpha": 0.5}, "distill_alpha: 0.5 would change nothing without use_distillation"),
        ({"eval_save_predictions": True}, "would change nothing without use_enhanced_eval"),
        ({"eval_metrics": "bleu"}, "would change nothing without use_enhanced_eval"),
        ({"use_distillation": True}, "teacher_model: not given"),
        ({"gradient_checkpointing": True, "disable_gradient_checkpointing": True}, "one excludes the other"),
        ({"save_steps": 10}, "would change nothing without save_strategy steps"),
        ({"save_strategy": "no", "save_total_limit": 3}, "would change nothing with save_strategy no"),
        ({"resume_from_checkpoint": "out/checkpoint-3"}, "a run goes on from the newest whole checkpoint there"),
        ({"wandb_visualizer": True}, "wandb beta leet"),
        ({"wandb_run_id": "abc"}, "the id is kept in the run folder"),
        ({"push_to_hub": True}, "push_to_hub: needs repo_id OWNER/NAME, or username OWNER"),
        ({"repo_id": "a/b"}, "repo_id: would change nothing without push_to_hub"),
        ({"chat_template": "chatml"}, "chatml puts conversations into text, and the rows hold text already"),
        ({"chat_template": "tokenizer"}, "tokenizer puts conversations into text, and the rows hold text already"),
        ({"train_split": "test"}, "is one file and has no splits. Leave it out"),
        ({"valid_split": "a", "valid_path": "b"}, "one excludes the other"),
        ({"text_column": "txt"}, "no column 'txt' in the first row, which has 'text', 'more'. Did you mean text?"),
        ({"valid_split": "valid"}, "is one file and has no splits"),
        ({"batch_size": 0}, "batch_size: found 0; allowed: a whole number of at least 1"),
        ({"lr": -1.0}, "optimizer.lr (lr): found -1.0"),
        ({"overrides": {"optimizer.lr": 1e-3}, "lr": 1e-4}, "optimizer.lr: given twice, as lr and in overrides"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_says_what_to_write(values: dict[str, Any], said: str, texts: Path):
    assert said in problems(texts, **values)


def test_everything_wrong_is_said_at_once_in_the_callers_words():
    with pytest.raises(RecipeError) as caught:
        recipe_of(asked(config_of("--trainer dpo --epochs 0 --unsloth".split())[0], flag_of))
    said = str(caught.value)
    assert caught.value.problems[0].startswith("--trainer: found 'dpo'")
    lines = ("(--epochs): found 0", "(--model): not given", "(--data-path): not given", "(--project-name): not given")
    for line in lines:
        assert line in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning-rate 1e-4", "--learning-rate: not a flag. Did you mean --lr?"),
        ("--use_peft", "--use-peft: not a flag. Did you mean --peft?"),
        ("--epohcs 3", "--epohcs: not a flag. Did you mean --epochs?"),
        ("--lr fast", "--lr: found 'fast'; allowed: a number"),
        ("--block-size 512,1024", "Lists of lengths are not here; give one"),
        ("--no-peft true", "--no-peft: takes no value"),
        ("--wandb-token abc", "--wandb-token: a secret, which is not taken here"),
        ("lost", "lost: not understood"),
    ],
)
def test_flags_that_are_none_name_the_nearest(words: str, said: str):
    with pytest.raises(RecipeError) as caught:
        config_of(words.split())
    assert said in str(caught.value)


def test_an_outer_launcher_is_told_apart(texts: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "started in several processes, by accelerate launch or torchrun" in problems(texts)


def test_a_folder_is_its_split_or_all_of_it(texts: Path):
    folder = texts.parent
    assert recipe(folder).data.path == str(texts)
    (folder / "valid.jsonl").write_text('{"text": "four"}\n')
    found = recipe(folder, valid_split="valid")
    assert (found.data.path, found.data.validation) == (str(texts), str(folder / "valid.jsonl"))
    assert "is called training" in problems(folder, train_split="training")
    texts.rename(folder / "questions.csv")
    assert recipe(folder).data.path == str(folder)
    assert "lies in" in problems(folder, project_name=str(folder / "out"))


@pytest.mark.parametrize("as_text", [False, True])
def test_a_column_of_messages_is_a_conversation(as_text: bool, tmp_path: Path):
    turns: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"talk": json.dumps(turns) if as_text else turns}) + "\n")
    found = recipe(tmp_path / "chat.jsonl", text_column="talk", chat_template="zephyr")
    assert (found.data.format, found.data.columns) == ("messages", {"messages": "talk"})
    assert found.data.chat_template == "zephyr"
    assert "the rows are conversations" in problems(tmp_path / "chat.jsonl", text_column="talk", chat_template="none")
    said = problems(tmp_path / "chat.jsonl", text_column="talk", add_eos_token=False)
    assert "what closes these is the chat template's to say" in said


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_a_single_file_of_each_kind_is_read(ending: str, tmp_path: Path):
    import pandas

    frame, path = pandas.DataFrame({"said": ["one", "two"]}), tmp_path / f"rows.{ending}"
    if ending.startswith("json"):
        frame.to_json(path, orient="records", lines=ending == "jsonl")
    else:
        getattr(frame, f"to_{ending}")(path, index=False)
    found = recipe(path, text_column="said")
    assert (found.data.format, found.data.columns) == ("text", {"text": "said"})
    assert "no column 'text' in" in problems(path, text_column="text")


def test_prompt_and_answer_are_named_by_two_columns(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"ask": "a", "say": "b"}\n')
    found = recipe(tmp_path / "pairs.jsonl", text_column="say", prompt_text_column="ask")
    assert (found.data.format, found.data.columns) == ("prompt_completion", {"prompt": "ask", "completion": "say"})


def test_reports_and_saving(texts: Path):
    found = recipe(
        texts, project_name="some/where", log="wandb", save_strategy="steps", save_steps=7, logging_steps=5,
        save_total_limit=2, distributed_backend="ddp", mixed_precision="bf16", gradient_checkpointing=True,
        disable_gradient_checkpointing=False, response_only_loss=False, add_eos_token=False, max_samples=9, seed=1,
    )  # fmt: skip
    assert (found.monitoring.wandb, found.monitoring.wandb_project) == (True, "where")
    assert (found.checkpoint.at_epoch, found.checkpoint.interval, found.checkpoint.keep_last) == (False, 7, 2)
    assert (found.monitoring.log_interval, found.processes.procs, found.model.dtype) == (5, "gpu", "bfloat16")
    assert (found.training.activation_checkpointing, found.data.unmask) == ("full", True)
    assert (found.data.end_token, found.data.max_rows, found.seed) == (False, 9, 1)


def test_the_help_page_has_every_flag():
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(set(LLMTrainingParams.model_fields) - {"overrides"})


def test_a_push_names_the_repository_and_is_private_unless_it_is_not(texts: Path):
    mine = recipe(texts, push_to_hub=True, username="me", project_name="out/tuned").hub
    assert (mine.push, mine.repo_id, mine.private) == (True, "me/tuned", True)
    theirs = recipe(texts, push_to_hub=True, repo_id="them/model", hub_private=False).hub
    assert (theirs.push, theirs.repo_id, theirs.private) == (True, "them/model", False)

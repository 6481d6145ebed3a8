"""What else AutoTrain documents of the command that its guide is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.documents.autotrain.page import TEXTS, command
from training_hub.trainers.clm import train
from training_hub.trainers.clm.params import LLMTrainingParams
from training_hub.trainers.clm.train_clm_sft import CustomSFTTrainer


def test_its_file_is_a_command_of_its_own(gpt2: str):
    Path("run.yml").write_text(
        f"task: llm-sft\nbase_model: {gpt2}\nproject_name: from-file\nlog: none\nbackend: local\n"
        "data:\n  path: ./data\n  train_split: train\n  valid_split: null\n  chat_template: none\n"
        "  column_mapping: {text_column: text}\n"
        "params: {epochs: 1, batch_size: 2, lr: 3.0e-5, mixed_precision: fp16, block_size: 128}\n"
        "hub: {username: '${HF_USERNAME}', token: '${HF_TOKEN}', push_to_hub: false}\n"
    )
    assert command("aitraining --config run.yml")[0] == 0
    assert Path("from-file/final/model.safetensors").is_file()


def test_text_without_an_end_token(gpt2: str):
    line = f"aitraining llm --model {gpt2} --data-path ./data --epochs 1"
    assert command(f"{line} --project-name with")[0] == 0
    assert command(f"{line} --project-name without --no-add-eos-token")[0] == 0
    plans = [json.loads((Path(name) / "plan.json").read_text()) for name in ("with", "without")]
    assert plans[0]["tokens"] - plans[1]["tokens"] == len(TEXTS)


def test_pushing_without_a_token_is_refused_in_words(gpt2: str, monkeypatch: pytest.MonkeyPatch):
    config = LLMTrainingParams(model=gpt2, data_path="./data", project_name="mine", epochs=1)
    model = train(config)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        model.push_to_hub("me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RuntimeError, match=r"there is no token\. Set HF_TOKEN"):
        model.push_to_hub("me/mine")
    config.push_to_hub, config.username, config.project_name = True, "me", "pushed"
    with pytest.raises(ValueError, match=r"there is no token\. Set HF_TOKEN"):
        train(config)
    assert not Path("pushed").exists(), "asked before anything is trained"


def test_a_trainer_that_is_given_something_else_says_so(gpt2: str):
    with pytest.raises(ValueError, match=r"args: found a dict; allowed: LLMTrainingParams"):
        CustomSFTTrainer(model=gpt2, args={"lr": 1})  # type: ignore[arg-type]

    class Short(CustomSFTTrainer):
        def preprocess_function(self, examples):
            return {"text": examples["text"], "more": []}

    trainer = Short(model=gpt2, args=LLMTrainingParams(project_name="short"), train_dataset=[{"text": "a"}])
    with pytest.raises(ValueError, match="all must have as many"):
        trainer.train()

"""AutoTrain's guide "Supervised Fine-Tuning (SFT)": each of its snippets, here, on a CPU.

Names, flags and defaults are the guide's; models are tiny ones, `aitraining` is `training-hub`, and `autotrain.` in an
import is `training_hub.`. What the guide gets wrong, and what one machine cannot do, is answered by an error that says
what to write; the tests of these are named so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.documents.autotrain.page import CHAT, TEXTS, command, error_of, recipe_in
from training_hub.trainers.clm import train
from training_hub.trainers.clm.params import LLMTrainingParams
from training_hub.trainers.clm.train_clm_sft import CustomSFTTrainer

# Quick start


def test_basic_sft_training_without_the_flag_train(gpt2: str):
    code, _ = command(f"""aitraining llm \\
      --model {gpt2} \\
      --trainer sft \\
      --data-path ./data \\
      --text-column text \\
      --project-name my-sft-model \\
      --epochs 3 \\
      --batch-size 8 \\
      --lr 5e-5
    """)
    assert code == 0
    assert (Path("my-sft-model") / "final" / "model.safetensors").is_file()
    assert recipe_in("my-sft-model")["training"]["global_batch_size"] == 32, "8, times the guide's accumulation of 4"


def test_with_peft_and_int4(tiny_model_folder: Path):
    code, _ = command(f"""aitraining llm \\
      --model {tiny_model_folder} \\
      --trainer sft \\
      --data-path ./data \\
      --text-column text \\
      --project-name llama-sft-lora \\
      --peft \\
      --lora-r 16 \\
      --lora-alpha 32 \\
      --quantization int4 \\
      --epochs 3
    """)
    assert code == 0
    found = recipe_in("llama-sft-lora")
    assert (found["lora"]["r"], found["lora"]["alpha"], found["model"]["quantization"]) == (16, 32, "int4")
    assert (Path("llama-sft-lora") / "final" / "adapter_config.json").is_file()


def test_chat_style_training(gpt2: str):
    code, _ = command(f"""aitraining llm \\
      --model {gpt2} \\
      --trainer sft \\
      --data-path ./chat_data \\
      --text-column messages \\
      --chat-template chatml \\
      --project-name chat-model \\
      --epochs 3
    """)
    assert code == 0


def test_the_python_api_gives_a_model(gpt2: str):
    config = LLMTrainingParams(
        model=gpt2,
        trainer="sft",
        data_path="./data",
        text_column="text",
        project_name="my-sft-model",
        epochs=3,
        batch_size=8,
        lr=5e-5,
        warmup_ratio=0.1,
        gradient_accumulation=4,
        peft=True,
        lora_r=16,
        lora_alpha=32,
        mixed_precision="fp16",
        gradient_checkpointing=True,
        use_flash_attention_2=True,
    )
    model = train(config)
    assert model.status == "finished"
    assert isinstance(model.generate("Question: What is Python?", max_new_tokens=4), str)


def test_merging_leaves_the_adapter_and_writes_a_model_beside_it(tiny_model_folder: Path):
    line = f"aitraining llm --model {tiny_model_folder} --data-path ./data --project-name both --epochs 1 --peft"
    assert command(f"{line} --lora-r 4 --merge-adapter")[0] == 0
    assert Path("both/final/adapter_model.safetensors").is_file()
    assert Path("both/merged/model.safetensors").is_file()


# Parameters: the tables are held by tests/frontends/autotrain, with their defaults


# Training features


def test_knowledge_distillation(gpt2: str):
    code, _ = command(f"""aitraining llm \\
      --model {gpt2} \\
      --trainer sft \\
      --use-distillation \\
      --teacher-model {gpt2} \\
      --distill-temperature 3.0 \\
      --distill-alpha 0.7 \\
      --data-path ./data \\
      --project-name distilled-model
    """)
    assert code == 0
    found = recipe_in("distilled-model")["distillation"]
    assert (found["teacher"], found["temperature"], found["alpha"]) == (gpt2, 3.0, 0.7)


@pytest.mark.parametrize("template", ["chatml", "zephyr", "llama", "alpaca", "vicuna", "mistral"])
def test_each_of_the_six_templates_trains_a_single_file(template: str, gpt2: str):
    code, _ = command(f"""aitraining llm \\
      --model {gpt2} \\
      --trainer sft \\
      --data-path ./conversations.json \\
      --text-column messages \\
      --chat-template {template} \\
      --project-name chatbot --epochs 1
    """)
    assert code == 0
    tokenizer = json.loads((Path("chatbot") / "final" / "tokenizer_config.json").read_text())
    beside = Path("chatbot") / "final" / "chat_template.jinja"
    assert beside.is_file() or tokenizer.get("chat_template"), "who serves the model needs the template"


def test_custom_metrics_are_measured_and_answers_kept(gpt2: str):
    config = LLMTrainingParams(
        trainer="sft",
        use_enhanced_eval=True,
        eval_metrics="perplexity,bleu,rouge",
        eval_save_predictions=True,
        # ... other params
        model=gpt2,
        data_path=[{"messages": [*CHAT[0]["messages"][:2], answer(number)]} for number in range(20)],
        text_column="messages",
        chat_template="chatml",
        project_name="measured",
        epochs=1,
    )
    model = train(config)
    for name in ("validation_perplexity", "bleu", "rouge1", "rougeL"):
        assert any(name in key for line in model.history for key in _keys(line)), name
    assert any(path.name.startswith("predictions") for path in Path("measured").rglob("*.jsonl"))


def answer(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"Python is a language, number {number}."}


def _keys(line: dict[str, Any]) -> list[str]:
    return [*line, *line.get("measures", {})]


# Examples


def test_example_1_a_csv_file_by_its_name(gpt2: str):
    import pandas as pd

    data = pd.DataFrame({"text": TEXTS})
    data.to_csv("./train.csv", index=False)
    config = LLMTrainingParams(
        model=gpt2,
        trainer="sft",
        data_path="./train.csv",
        text_column="text",
        project_name="gpt2-qa",
        epochs=5,
        batch_size=4,
        lr=2e-5,
        max_seq_length=512,
    )
    model = train(config)
    assert [line["step"] for line in model.history] == [1, 2, 3, 4, 5]
    model.save_pretrained("elsewhere")
    assert Path("elsewhere/model.safetensors").is_file()
    of_frame = train(
        LLMTrainingParams(model=gpt2, data_path=data, project_name="frame", epochs=5, batch_size=4, lr=2e-5)
    )
    assert [line["loss"] for line in of_frame.history] == [line["loss"] for line in model.history]


def test_example_2_lora(tiny_model_folder: Path):
    config = LLMTrainingParams(
        model=str(tiny_model_folder),
        trainer="sft",
        data_path="./instructions.json",
        text_column="text",
        project_name="llama2-lora",
        peft=True,
        lora_r=64,
        lora_alpha=128,
        lora_dropout=0.1,
        target_modules="q_proj,v_proj,k_proj,o_proj",
        quantization="int4",
        mixed_precision="fp16",
        gradient_checkpointing=True,
        epochs=3,
        batch_size=1,
        gradient_accumulation=16,
        lr=1e-4,
    )
    model = train(config)
    adapter = json.loads((model.model_path / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (64, 128, 0.1)


def test_example_3_chat(gpt2: str):
    with open("chat_data.json", "w") as file:
        json.dump(CHAT, file)
    config = LLMTrainingParams(
        model=gpt2,
        trainer="sft",
        data_path="chat_data.json",
        text_column="messages",
        chat_template="chatml",
        project_name="chatbot",
        epochs=3,
        batch_size=4,
    )
    model = train(config)
    asked = [{"role": "user", "content": "What is Python?"}]
    assert isinstance(model.generate(asked, max_new_tokens=4), str)
    # The answer and the token that ends it are trained, and nothing else: 44 characters in some tokens, and one more.
    assert 0 < model.plan["trained_tokens"] < model.plan["tokens"]


# Advanced usage


def test_custom_data_preprocessing_is_called(gpt2: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[str] = []

    class MySFTTrainer(CustomSFTTrainer):
        def preprocess_function(self, examples):
            texts = []
            for text in examples[self.text_column]:
                seen.append(text)
                formatted = f"### Instruction: {text}\n### Response: "
                texts.append(formatted)
            return {"text": texts}

    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    training_args = LLMTrainingParams(project_name="custom", text_column="question", epochs=1, batch_size=1)
    trainer = MySFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(gpt2),
        args=training_args,
        train_dataset=[{"question": "What is Python?"}, {"question": "What is ML?"}],
        tokenizer=tokenizer,
    )
    model = trainer.train()
    assert seen == ["What is Python?", "What is ML?"]
    texts = [f"### Instruction: {text}\n### Response: " for text in seen]
    length = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    assert model.plan["tokens"] == length, "what it gave back, and an end-of-sequence token for each"


def test_weights_and_biases(gpt2: str):
    from training_hub.frontends.autotrain.meaning import asked
    from training_hub.frontends.autotrain.run import recipe_of

    config = LLMTrainingParams(
        trainer="sft",
        log="wandb",  # Enable W&B logging
        project_name="my-project",
        # ... other params
        model=gpt2,
        data_path="./data",
    )
    monitoring = recipe_of(asked(config)).monitoring
    assert (monitoring.wandb, monitoring.wandb_project) == (True, "my-project")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="several GPUs")
def test_ddp_on_one_device_is_one_process(gpt2: str):
    code, _ = command(f"""aitraining llm \\
      --trainer sft \\
      --distributed-backend "ddp" \\
      --model {gpt2} --data-path ./data --project-name ddp --epochs 1   # ... other params
    """)
    assert code == 0


def test_wrong_in_the_guide_accelerate_starts_this_command_once_for_each_process(
    gpt2: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as `accelerate launch --multi_gpu --num_processes 4` sets it
    line = f"aitraining llm --trainer sft --model {gpt2} --data-path ./data --project-name nested"
    assert "starts its own. Run it alone, with --distributed-backend ddp" in error_of(line, capsys)
    assert not Path("nested").exists()


# Troubleshooting


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 1 --gradient-accumulation 32",
        "--gradient-checkpointing --quantization int4 --peft --lora-r 8",
        "--peft --lora-r 8",
        "--lr 1e-5",
        "--warmup-ratio 0.2",
        "--use-flash-attention-2",
        "--mixed-precision fp16",
        "--packing",
    ],
)
def test_each_remedy_of_the_guide_is_taken(flags: str, tiny_model_folder: Path):
    line = f"aitraining llm --model {tiny_model_folder} --data-path ./data --project-name remedy --epochs 1 {flags}"
    assert command(line)[0] == 0


def test_wrong_in_the_guide_quantization_without_peft_says_what_it_needs(gpt2: str, capsys: pytest.CaptureFixture[str]):
    line = f"aitraining llm --model {gpt2} --data-path ./data --project-name out --gradient-checkpointing"
    assert "--quantization: 'int4' would change nothing without --peft" in error_of(
        f"{line} --quantization int4", capsys
    )


def test_early_stopping_is_a_flag(gpt2: str):
    line = f"aitraining llm --model {gpt2} --data-path ./data --project-name early --early-stopping-patience 2"
    (Path("data") / "valid.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    assert command(f"{line} --valid-split valid --epochs 2")[0] == 0
    assert recipe_in("early")["evaluation"]["early_stopping_patience"] == 2


@pytest.mark.parametrize("trainer", ["dpo", "ppo", "orpo", "reward"])
def test_what_its_next_steps_name_is_refused_by_name(trainer: str, gpt2: str, capsys: pytest.CaptureFixture[str]):
    line = f"aitraining llm --trainer {trainer} --model {gpt2} --data-path ./data --project-name out"
    assert f"--trainer: found '{trainer}'; only sft is here" in error_of(line, capsys)

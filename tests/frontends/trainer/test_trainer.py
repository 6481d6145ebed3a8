"""Runs of SFTTrainer: what is trained, measured, told and saved; and the defects of EasyDeL's own path, which are none
here. EasyDeL 0.3.0 crashes on packing, trains on padding, scales the loss by the share of what is trained, rounds
weights to float16 as it loads them, does not know instruction and response, and ignores fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import CONVERSATIONS
from training_hub import (
    AutoEasyDeLModelForCausalLM,
    DataError,
    RecipeError,
    SFTConfig,
    SFTTrainer,
)
from training_hub.types import StepReport

QUICK = {"training.preflight": False, "monitoring.console": "off", "data.cache": False}
PAIRS = [{"instruction": f"Add 1 to {n}.", "response": f"{n + 1}."} for n in range(8)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def page(**fields: Any) -> SFTConfig:
    """A quick run of one step in float32, in EasyDeL's names."""
    own = {**QUICK, "model.dtype": "float32", **fields.pop("overrides", {})}
    return SFTConfig(**{"num_train_epochs": 1, "total_batch_size": 64, "overrides": own, **fields})


def run(folder: Any, rows: Any, config: SFTConfig, **more: Any) -> SFTTrainer:
    trainer = SFTTrainer(arguments=config, model=folder, train_dataset=rows, **more)
    trainer.train()
    return trainer


def result_of(trainer: SFTTrainer) -> Any:
    assert trainer._output is not None
    return trainer._output.result


# What EasyDeL gets wrong


def test_packed_rows_are_whole_and_give_the_loss_of_rows_alone(tiny_model_folder: Path):
    rows = list(CONVERSATIONS[:16])
    packed, alone = (
        result_of(run(str(tiny_model_folder), rows, page(model_name=f"packed-{packing}", packing=packing)))
        for packing in (True, False)
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    lengths = [len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]) for row in rows]
    assert packed.plan["tokens"] == alone.plan["tokens"] == sum(lengths), "no padding"
    # Float32 sums in another order: 1e-5 of a loss near 6 is ten times what was seen.
    assert packed.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], abs=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_that_are_trained(tiny_model_folder: Path):
    rows = list(CONVERSATIONS[:8])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        AutoTokenizer.from_pretrained(tiny_model_folder),
    )
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"])
        labels = torch.full_like(ids, -100)
        text = tokenizer.decode(ids)
        for message in row["messages"]:
            if message["role"] == "assistant":
                words = message["content"] + "<|im_end|>"
                at = text.index(words)
                start = len(tokenizer(text[:at])["input_ids"])
                end = len(tokenizer(text[: at + len(words)])["input_ids"])
                labels[start:end] = ids[start:end]
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels != -100).sum())
    found = result_of(run(str(tiny_model_folder), rows, page(model_name="loss")))
    assert found.plan["trained_tokens"] == count
    assert found.history[0]["loss"] == pytest.approx(total / count, abs=1e-5), "not scaled by the prompts' share"


def test_accumulating_changes_nothing(tiny_model_folder: Path):
    rows = list(CONVERSATIONS[:8])
    whole = page(model_name="whole", total_batch_size=8, num_train_epochs=2)
    parts = page(model_name="parts", total_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=2)
    losses = [[row["loss"] for row in result_of(run(str(tiny_model_folder), rows, c)).history] for c in (whole, parts)]
    assert losses[0] == losses[1]


def test_frozen_weights_keep_every_bit_and_others_move(tiny_model_folder: Path):
    config = page(model_name="frozen", frozen_parameters="model.layers.0", learning_rate=1e-3)
    run(str(tiny_model_folder), list(CONVERSATIONS[:8]), config)
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file("EasyDeL-Checkpoints/frozen/final/model.safetensors")
    assert any(not torch.equal(weight, weight.half().float()) for weight in before.values()), "float16 would show"
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == ("layers.0." in name), name


def test_instruction_and_response_are_a_conversation(tiny_model_folder: Path):
    roles = (("user", "instruction"), ("assistant", "response"))
    told = [{"messages": [{"role": role, "content": row[column]} for role, column in roles]} for row in PAIRS]
    first, second = (
        result_of(run(str(tiny_model_folder), rows, page(model_name=name)))
        for name, rows in (("pairs", PAIRS), ("told", told))
    )
    assert first.plan["trained_tokens"] == second.plan["trained_tokens"] > 0
    assert first.history[0]["loss"] == second.history[0]["loss"]


# Rows


@pytest.mark.parametrize(
    "function",
    [
        lambda row: f"{row['instruction']} {row['response']}",
        lambda row: [f"{row['instruction']} {row['response']}"],
        lambda row: {"text": f"{row['instruction']} {row['response']}"},
        lambda rows: [f"{a} {b}" for a, b in zip(rows["instruction"], rows["response"], strict=True)],
        lambda rows: [rows["instruction"][i] + " " + rows["response"][i] for i in range(len(rows["response"]))],
    ],
    ids=["text", "a list of one", "a row", "columns, zipped", "columns, by index"],
)
def test_formatting_functions_of_rows_and_of_columns(function: Any, tiny_model_folder: Path):
    config = page(model_name="formatted", dataset_batch_size=3)
    found = result_of(run(str(tiny_model_folder), PAIRS, config, formatting_func=function))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    texts = [f"{row['instruction']} {row['response']}" for row in PAIRS]
    assert found.plan["samples"] == 8
    assert found.plan["tokens"] == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)


def test_a_formatting_function_may_make_several_rows_of_one(tiny_model_folder: Path):
    def both(row: dict[str, str]) -> list[str]:
        return [row["instruction"].upper(), row["response"].upper()]

    config = page(overrides={"training.preflight": True})
    assert result_of(run(str(tiny_model_folder), PAIRS, config, formatting_func=both)).plan["samples"] == 16
    proofs = json.loads(Path("EasyDeL-Checkpoints/SFTTrainer/preflight.json").read_text())["proofs"]
    told = next(one for one in proofs if "trained text" in json.dumps(one))
    assert told["status"] == "holds", "the rows can be read a second time"


def test_formatting_functions_that_fail_name_the_row(tiny_model_folder: Path):
    make = {"arguments": page(), "model": str(tiny_model_folder)}
    with pytest.raises(RecipeError, match="formatting_func: raised KeyError for row 1 of train_dataset: 'question'"):
        SFTTrainer(**make, train_dataset=PAIRS, formatting_func=lambda row: row["question"])
    with pytest.raises(RecipeError, match=r"formatting_func: gave 3 for row 1 of train_dataset; allowed: a text"):
        SFTTrainer(**make, train_dataset=PAIRS, formatting_func=lambda row: 3)
    broken = [*PAIRS, {"instruction": "no answer"}]
    trainer = SFTTrainer(**make, train_dataset=broken, formatting_func=lambda row: row["instruction"] + row["response"])
    with pytest.raises(DataError, match="raised KeyError for row 9 of train_dataset"):
        trainer.train()
    with pytest.raises(RecipeError, match="formatting_func needs rows in memory"):
        SFTTrainer(**make, train_dataset="rows.jsonl", formatting_func=str)


def test_columns_that_are_not_there_name_the_nearest(tiny_model_folder: Path):
    with pytest.raises(RecipeError, match=r"no column 'respose' in the first row .* Did you mean response\?"):
        SFTTrainer(arguments=page(dataset_text_field="respose"), model=str(tiny_model_folder), train_dataset=PAIRS)
    config = page(ids_to_pop_from_dataset=["instruction"], dataset_text_field="response")
    found = result_of(run(str(tiny_model_folder), PAIRS, config))
    assert found.plan["samples"] == 8


def test_a_collator_labels_rows_of_tokens(tiny_model_folder: Path):
    def second_half(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        labels = ids.clone()
        labels[:, : ids.shape[1] // 2] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    rows = [{"input_ids": list(range(5, 25))} for _ in range(4)]
    found = result_of(run(str(tiny_model_folder), rows, page(), data_collator=second_half))
    assert (found.plan["tokens"], found.plan["trained_tokens"]) == (80, 40)
    trainer = SFTTrainer(
        arguments=page(model_name="text"), model=str(tiny_model_folder), train_dataset=rows, data_collator=second_half
    )
    assert trainer.recipe.output.endswith("text")
    with pytest.raises(RecipeError, match="data_collator: a collator labels token ids, and row 1 of train_dataset has"):
        SFTTrainer(
            arguments=page(), model=str(tiny_model_folder), train_dataset=PAIRS, data_collator=second_half
        ).train()


# Evaluation


def test_several_evaluation_sets_are_measured_each_and_together(tiny_model_folder: Path):
    sets = {"easy": list(CONVERSATIONS[20:24]), "hard": PAIRS}
    trainer = SFTTrainer(
        arguments=page(eval_packing=False), model=str(tiny_model_folder), train_dataset=list(CONVERSATIONS[:8]),
        eval_dataset=sets,
    )  # fmt: skip
    before = trainer.evaluate()
    assert set(before) == {f"eval_{name}_{what}" for name in sets for what in ("loss", "perplexity", "rows")}
    trainer.train()
    last = result_of(trainer).history[-1]
    after = trainer.evaluate()
    for name in sets:
        # The saved model and the one in memory hold the same float32 weights.
        assert after[f"eval_{name}_loss"] == pytest.approx(last[f"validation_loss/{name}"], abs=1e-5)
        assert after[f"eval_{name}_loss"] < before[f"eval_{name}_loss"], "one step of learning"
    assert (
        min(after[f"eval_{n}_loss"] for n in sets)
        < last["validation_loss"]
        < max(after[f"eval_{n}_loss"] for n in sets)
    )
    logged = trainer.state.log_history[-1]
    assert logged["eval_easy_loss"] == last["validation_loss/easy"]
    assert logged["eval_loss"] == last["validation_loss"]


def test_a_model_in_memory_is_trained_in_place_and_measured(tiny_model_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    weight = model.model.layers[0].mlp.up_proj.weight
    start = weight.detach().clone()
    trainer = SFTTrainer(
        arguments=page(learning_rate=1e-3), model=model, train_dataset=PAIRS, eval_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    assert torch.equal(weight, start), "measuring leaves it as it is"
    output = trainer.train()
    assert (output.global_step, output.training_loss) == (1, output.result.history[0]["loss"])
    assert trainer.model is model
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, start)
    assert trainer.evaluate(PAIRS, metric_key_prefix="test")["test_loss"] < before
    trainer.save_pretrained("elsewhere")
    saved = load_file("elsewhere/model.safetensors")
    assert torch.equal(saved["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    assert AutoTokenizer.from_pretrained("elsewhere").eos_token == "<|im_end|>"
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    again = SFTTrainer(
        arguments=page(learning_rate=1e-3), model=other, train_dataset=PAIRS, eval_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )  # fmt: skip
    assert again.train().result.status == "already finished"
    found = again.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(found, model.model.layers[0].mlp.up_proj.weight), (
        "what that run came to, not what was handed over"
    )


def test_a_model_by_name_is_one_before_and_after(tiny_model_folder: Path):
    handle = AutoEasyDeLModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    assert handle.config.hidden_size == 32
    trainer = SFTTrainer(
        model=handle, args=SFTConfig(output_dir="out", max_steps=1, overrides=QUICK), train_dataset=PAIRS
    )
    trainer.save_model("before")
    trainer.train()
    trainer.save_model()
    weights = [load_file(Path(name) / "model.safetensors") for name in ("before", "out", "out/final")]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[1][name], weights[2][name])
    assert not torch.equal(weights[0][name], weights[1][name])
    assert trainer.model.config.hidden_size == 32
    again = SFTTrainer(model=str(tiny_model_folder), args=SFTConfig("out", max_steps=1, overrides=QUICK),
                       train_dataset=PAIRS)  # fmt: skip
    with pytest.raises(RuntimeError, match="a finished run of a different recipe"):
        SFTTrainer(model=str(tiny_model_folder), args=SFTConfig("out", max_steps=2, overrides=QUICK),
                   train_dataset=PAIRS).train()  # fmt: skip
    assert again.train(resume_from_checkpoint=False).result.status == "finished"
    with pytest.raises(RecipeError, match="resume_from_checkpoint: found 'out/checkpoint-1'"):
        again.train(resume_from_checkpoint="out/checkpoint-1")


def test_weights_under_an_adapter_may_be_quantised():
    transformers = pytest.importorskip("transformers")
    four, eight = (transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}) for bits in (4, 8))
    peft = pytest.importorskip("peft")
    adapter = {"peft_config": peft.LoraConfig(r=4), "train_dataset": PAIRS, "args": SFTConfig("o")}
    assert SFTTrainer("m", quantization_config=four, **adapter).recipe.model.quantization == "int4"
    handle = AutoEasyDeLModelForCausalLM.from_pretrained("m", quantization_config=eight)
    assert SFTTrainer(handle, **adapter).recipe.model.quantization == "int8"
    with pytest.raises(RecipeError, match="int4 numbers cannot move by a gradient"):
        SFTTrainer("m", SFTConfig("o"), train_dataset=PAIRS, quantization_config=four)


def test_compute_metrics_is_asked_about_texts(tiny_model_folder: Path):
    def ends_with_point(answer: str, reference: str) -> float:
        return float(reference.endswith("."))

    trainer = SFTTrainer(
        args=SFTConfig("out", max_steps=1, eval_strategy="epoch", overrides={**QUICK, "evaluation.max_new_tokens": 4}),
        model=str(tiny_model_folder), train_dataset=PAIRS, eval_dataset=PAIRS[:2], compute_metrics=ends_with_point,
    )  # fmt: skip
    assert trainer.train().metrics["validation_ends_with_point"] == 1.0
    assert trainer.evaluate()["eval_ends_with_point"] == 1.0
    with pytest.raises(RecipeError, match=r"compute_metrics: .* Give a function of two texts"):
        SFTTrainer(args=SFTConfig("o"), model="m", train_dataset=PAIRS, compute_metrics=lambda prediction: {})


# Adapters


def test_a_configuration_of_peft_trains_an_adapter(tiny_model_folder: Path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True,
                             layers_to_transform=[1], task_type="CAUSAL_LM")  # fmt: skip
    trainer = SFTTrainer(
        model=str(tiny_model_folder), args=SFTConfig("out", max_steps=1, learning_rate=1e-3, overrides=QUICK),
        train_dataset=PAIRS, peft_config=config,
    )  # fmt: skip
    lora = trainer.recipe.lora
    assert (lora.tuner, lora.r, lora.alpha, lora.target_modules) == ("rslora", 4, 8, ["q_proj", "v_proj"])
    assert lora.options == {"layers_to_transform": [1]}
    trainer.train()
    written = json.loads(Path("out/final/adapter_config.json").read_text())
    assert (written["r"], written["use_rslora"], written["layers_to_transform"]) == (4, True, [1])
    other = SFTTrainer(model="m", args=SFTConfig("o"), train_dataset=PAIRS, peft_config=peft.VeraConfig(r=8)).recipe
    assert (other.lora.tuner, other.lora.r) == ("vera", 8)
    with pytest.raises(RecipeError, match="peft_config: found a dict; allowed: a configuration of PEFT"):
        SFTTrainer(model="m", args=SFTConfig("o"), train_dataset=PAIRS, peft_config={"r": 8})
    with pytest.raises(RecipeError, match="task_type is 'SEQ_CLS'"):
        SFTTrainer(
            model="m", args=SFTConfig("o"), train_dataset=PAIRS, peft_config=peft.LoraConfig(task_type="SEQ_CLS")
        )


# What scripts call


def test_what_scripts_of_transformers_call_is_there(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]):
    reports: list[StepReport] = []
    args = SFTConfig("out", max_steps=2, logging_steps=1, overrides={**QUICK, "monitoring.console": "plain"})
    trainer = SFTTrainer(str(tiny_model_folder), args, train_dataset=PAIRS)
    trainer.add_callback(reports.append)
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    assert trainer.is_world_process_zero() and len(reports) == 2
    assert f"train metrics: train_loss {metrics['train_loss']:.6g}" in capsys.readouterr().out
    assert json.loads(Path("out/train_results.json").read_text())["train_loss"] == metrics["train_loss"]
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [1, 2]
    assert state["global_step"] == state["max_steps"] == 2


def test_a_method_that_would_never_be_called_is_refused():
    with pytest.raises(RecipeError, match="Mine: compute_loss, log of another trainer would never be called here"):

        class Mine(SFTTrainer):
            def compute_loss(self, *args: Any) -> None: ...

            def log(self, *args: Any) -> None: ...

    class Other(SFTTrainer):
        def report(self) -> str:
            return self.recipe.output

    assert Other("m", SFTConfig("here"), train_dataset=PAIRS).report() == "here"

"""Whole runs with a teacher: online, kept, behind a prompt; how a step is cut and where a run stops change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariants.run import final_weights, recipe, train
from training_hub.errors import CheckpointError, DataError, RecipeError, TrainingError
from training_hub.launch import run

SGD: dict[str, Any] = {"optimizer": {"name": "SGD", "lr": 0.1}}
EVERY_STEP = {"interval": 1, "minutes": None}


def teach(teacher: Path, **more: Any) -> dict[str, Any]:
    return {"distillation": {"teacher": str(teacher), "temperature": 2.0, "alpha": 0.7, **more}}


def difference(one: Any, other: Any) -> float:
    first, second = final_weights(one), final_weights(other)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def same_bits(one: Any, other: Any) -> bool:
    first, second = final_weights(one), final_weights(other)
    same = all(torch.equal(first[name], second[name]) for name in first)
    return same and [row["loss"] for row in one.history] == [row["loss"] for row in other.history]


def stop_at_three(report: Any) -> None:
    if report.step == 3:
        raise TrainingError("stopped by the test")


@pytest.fixture(scope="module")
def online(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("online") / "run"
    return train(tiny_model_folder, chat_file, output, **SGD, **teach(tiny_teacher_folder))


def test_the_loss_of_a_step_is_that_of_transformers_and_kl_div(
    tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path
):
    """Each sample by itself, both models' full logits, torch's own kl_div; summed and divided once."""
    from transformers import AutoModelForCausalLM

    from training_hub.data.prepare import prepare
    from training_hub.data.templates import resolve_template
    from training_hub.data.tokenizer import ChatTokenizer
    from training_hub.monitoring.console import open_console

    asked = recipe(
        tiny_model_folder, chat_file, tmp_path / "run", training={"global_batch_size": 64}, **teach(tiny_teacher_folder)
    )
    first = run(asked).history[0]
    tokenizer = ChatTokenizer.load(str(tiny_model_folder))
    template = resolve_template(None, tokenizer)
    store = prepare(asked, tokenizer=tokenizer, template=template, console=open_console("off")).train
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(each).eval() for each in (tiny_model_folder, tiny_teacher_folder)
    )
    total, count = 0.0, 0.0
    for index in range(len(store)):
        sample = store[index]
        ids, weights = torch.tensor([sample.ids.tolist()]), torch.from_numpy(sample.weights.copy())[1:].double()
        with torch.no_grad():
            ours, theirs = (each(input_ids=ids).logits[0, :-1].double() for each in (student, teacher))
        common = ours.shape[-1]  # the teacher's twenty others stand for no token
        log_q, log_p = torch.log_softmax(ours / 2, -1), torch.log_softmax(theirs[:, :common] / 2, -1)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        tokens = torch.nn.functional.cross_entropy(ours, ids[0, 1:], reduction="none")
        total += float(((0.7 * 4 * kl + 0.3 * tokens) * weights).sum())
        count += float(weights.sum())
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_step_in_parts_is_the_step_as_a_whole(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path, online):
    alone = {"data": {"packing": False}}
    parts = train(tiny_model_folder, chat_file, tmp_path / "parts", **SGD, **alone, **teach(tiny_teacher_folder))
    assert difference(online, parts) < 1e-6  # float32 sums in another order, as in test_batches
    for one, other in zip(online.history, parts.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_model_that_teaches_itself_has_nothing_to_learn(tiny_model_folder, chat_file, tmp_path, divergence):
    asked = {"teacher": str(tiny_model_folder), "divergence": divergence}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **SGD, distillation=asked, training={"steps": 2})
    # Sums of some 300 terms near 1/300, each rounded to 6e-8 of itself.
    assert all(abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-5 for row in result.history)


def test_the_student_comes_closer_to_the_teacher(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path):
    asked = {"teacher": str(tiny_teacher_folder)}
    result = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "run",
        distillation=asked,
        training={"epochs": 4},
        optimizer={"lr": 1e-2},
    )
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]


def test_all_tokens_kept_train_as_the_teacher_beside_does(
    tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path, online
):
    whole = teach(tiny_teacher_folder, cache="top_k", top_k=10_000)
    kept = train(tiny_model_folder, chat_file, tmp_path / "run", **SGD, **whole)
    assert difference(online, kept) < 1e-6
    assert [row["loss"] for row in kept.history] == pytest.approx([row["loss"] for row in online.history], rel=1e-5)


@pytest.mark.parametrize(
    "how", [{}, {"cache": "top_k", "top_k": 8}, {"cache": "sampled", "samples": 8}, {"prompt": "Count."}], ids=str
)
def test_stopped_and_resumed_is_unbroken_bit_for_bit(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path, how):
    asked = {**teach(tiny_teacher_folder, **how), "loss": {"neftune_noise_alpha": 2}}
    asked |= {"data": {"cache": True, "cache_dir": str(tmp_path / "kept"), "validation_fraction": 0.1}}
    whole = train(tiny_model_folder, chat_file, tmp_path / "whole", **asked)
    with pytest.raises(TrainingError, match="stopped by the test"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [stop_at_three], **asked, checkpoint=EVERY_STEP)
    assert same_bits(train(tiny_model_folder, chat_file, tmp_path / "run", **asked, checkpoint=EVERY_STEP), whole)


def test_kept_targets_are_found_again_and_damaged_ones_made_again(
    tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path, capsys
):
    asked: dict[str, Any] = {**teach(tiny_teacher_folder, cache="top_k", top_k=8), "monitoring": {"console": "plain"}}
    asked["data"] = {"cache": True, "cache_dir": str(tmp_path / "kept")}
    first = train(tiny_model_folder, chat_file, tmp_path / "one", **asked)
    assert "teacher: loading" in capsys.readouterr().out
    again = train(tiny_model_folder, chat_file, tmp_path / "two", **asked, training={"max_tokens_per_gpu": 256})
    said = capsys.readouterr().out
    assert "teacher: asked before" in said and "teacher: loading" not in said
    assert [row["loss"] for row in again.history] == pytest.approx([row["loss"] for row in first.history], rel=1e-5)
    (ids,) = (tmp_path / "kept").rglob("part-000000/ids.bin")
    content = bytearray(ids.read_bytes())
    content[5] ^= 1
    ids.write_bytes(content)
    repaired = train(tiny_model_folder, chat_file, tmp_path / "three", **asked)
    assert "damaged and made again" in capsys.readouterr().out
    assert same_bits(repaired, first)


def test_another_teacher_under_the_same_path_is_refused(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_folder, folder)
    with pytest.raises(TrainingError, match="stopped by the test"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [stop_at_three], **teach(folder), checkpoint=EVERY_STEP)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="teacher_fingerprint"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **teach(folder), checkpoint=EVERY_STEP)


def test_osft_learns_from_a_teacher_too(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path):
    result = train(
        tiny_model_folder, chat_file, tmp_path / "run", **teach(tiny_teacher_folder), algorithm="osft",
        osft={"unfreeze_rank_ratio": 0.5, "cache": False}, training={"steps": 2},
    )  # fmt: skip
    assert result.history[-1]["osft_leak"] < 1e-5
    assert result.plan["teacher"]["divergence"] == "forward_kl"


def test_an_adapter_learns_from_a_teacher_too(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path):
    pytest.importorskip("peft")
    asked = {**teach(tiny_teacher_folder), "algorithm": "lora_sft", "optimizer": {"lr": 1e-2}}
    adapted = train(tiny_model_folder, chat_file, tmp_path / "adapter", **asked, lora={"r": 4})
    whole = train(tiny_model_folder, chat_file, tmp_path / "whole", **teach(tiny_teacher_folder))
    assert adapted.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-6)  # it begins as nothing
    assert adapted.history[-1]["loss"] < adapted.history[0]["loss"]


def test_proofs_hold_of_the_distance_from_a_teacher(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path):
    for how in ({}, {"cache": "top_k", "top_k": 8}, {"cache": "sampled"}, {"prompt": "Count."}):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        train(tiny_model_folder, chat_file, output, **teach(tiny_teacher_folder, **how), training={"steps": 1})
        proofs = {one["name"]: one["status"] for one in json.loads((output / "preflight.json").read_text())["proofs"]}
        assert proofs["fast loss is the plain one"] == "holds"
        assert proofs["accumulation leaves loss and gradient"] == "holds"
        assert "fails" not in proofs.values()


def test_a_teacher_with_a_prompt_reads_it_and_the_student_learns_the_same_tokens(
    tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path
):
    """The student's first loss against transformers: the teacher's logits behind the prompt, its own without it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in chat_file.read_text().splitlines()[:8]]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = "You are a very good counter."
    asked = {"teacher": str(tiny_teacher_folder), "prompt": prompt}
    first = train(tiny_model_folder, data, tmp_path / "run", distillation=asked).history[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(each).eval() for each in (tiny_model_folder, tiny_teacher_folder)
    )
    total, count = 0.0, 0
    for row in rows:
        messages = row["messages"]
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        theirs = [{"role": "system", "content": prompt}, *rest]
        logs = []
        for model, shown in ((student, messages), (teacher, theirs)):
            ids, places = trained_places(tokenizer, shown)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, [place - 1 for place in places]]
            logs.append(torch.log_softmax(logits[:, : len(tokenizer)].double(), -1))
        total += float((logs[1].exp() * (logs[1] - logs[0])).sum())
        count += len(places)
    assert first["trained_tokens"] == count
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


def trained_places(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids, and the places of what the assistant says with the token that ends its turn; chatml by hand."""
    ids: list[int] = []
    places: list[int] = []
    for message in messages:
        ids += tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
        said = tokenizer.encode(f"{message['content']}<|im_end|>", add_special_tokens=False)
        if message["role"] == "assistant":
            places += range(len(ids), len(ids) + len(said))
        ids += said + tokenizer.encode("\n", add_special_tokens=False)
    return ids, places


def test_rows_without_a_place_for_a_prompt_are_refused_by_line(tiny_model_folder, tiny_teacher_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "one two"}\n{"text": "three"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl line 2: distillation.prompt is a system message"):
        train(tiny_model_folder, data, tmp_path / "run", **teach(tiny_teacher_folder, prompt="Count."))


def test_another_vocabulary_is_refused_with_the_first_ids(tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = {index: token for token, index in vocabulary.items()}
    vocabulary[names[30]], vocabulary[names[31]] = 31, 30
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model.safetensors").rename(folder / "away")  # so that reading weights would be another error
    (folder / "away").rename(folder / "model.safetensors")
    with pytest.raises(RecipeError, match=r"2 of \d+ ids differ: id 30 is '.+' there and '.+' in the trained model"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **teach(folder))


def test_a_teacher_that_is_not_there_is_told_by_its_own_name(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(RecipeError, match=r"distillation.teacher: there is no folder .*nowhere"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **teach(tmp_path / "nowhere"))


def test_a_teacher_that_may_read_less_than_it_would_is_refused(
    tiny_model_folder, tiny_teacher_folder, chat_file, tmp_path
):
    with pytest.raises(DataError, match=r"the teacher reads .* more than distillation.max_teacher_length: 20"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **teach(tiny_teacher_folder, max_teacher_length=20))

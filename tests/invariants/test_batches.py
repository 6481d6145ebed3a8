"""How a step is cut never changes what it learns."""

from __future__ import annotations

import pytest
import torch

from tests.invariants.run import final_weights, recipe, train

# float32 sums in another order: 8 steps of AdamW at 1e-3 on weights of about 0.02 to 1.
TOLERANCE = 1e-6


def difference(one, other) -> float:
    first, second = final_weights(one), final_weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("one sample at a time", {"data": {"packing": False}}),
        ("packs of 256 tokens", {"training": {"max_tokens_per_gpu": 256}}),
    ],
)
def test_one_times_eight_equals_eight_times_one(tiny_model_folder, chat_file, tmp_path, name, settings):
    whole = train(tiny_model_folder, chat_file, tmp_path / "whole", optimizer={"name": "SGD", "lr": 0.1})
    parts = train(tiny_model_folder, chat_file, tmp_path / "parts", optimizer={"name": "SGD", "lr": 0.1}, **settings)
    assert difference(whole, parts) < TOLERANCE
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert one["trained_tokens"] == other["trained_tokens"]


def test_the_same_run_twice_gives_the_same_bits(tiny_model_folder, chat_file, tmp_path):
    first = train(tiny_model_folder, chat_file, tmp_path / "first")
    second = train(tiny_model_folder, chat_file, tmp_path / "second")
    for name, tensor in final_weights(first).items():
        assert torch.equal(tensor, final_weights(second)[name])


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(tiny_model_folder, chat_file, tmp_path):
    """Against transformers alone: each sample by itself, its own labels, summed and divided once."""
    from transformers import AutoModelForCausalLM

    from training_hub.data.prepare import prepare
    from training_hub.data.templates import resolve_template
    from training_hub.data.tokenizer import ChatTokenizer
    from training_hub.monitoring.console import open_console

    result = train(tiny_model_folder, chat_file, tmp_path / "run", training={"global_batch_size": 64})
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "other")
    tokenizer = ChatTokenizer.load(str(tiny_model_folder), trust_remote_code=False, revision=None)
    store = prepare(
        asked, tokenizer=tokenizer, template=resolve_template(None, tokenizer), console=open_console("off")
    ).train
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    total, count = 0.0, 0
    for index in range(len(store)):
        sample = store[index]
        labels = [int(token) if weight else -100 for token, weight in zip(sample.ids, sample.weights, strict=True)]
        trained = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            ids = torch.tensor([sample.ids.tolist()])
            total += float(model(input_ids=ids, labels=torch.tensor([labels])).loss) * trained
        count += trained
    assert result.history[0]["trained_tokens"] == count
    assert result.history[0]["loss"] == pytest.approx(total / count, rel=1e-5)

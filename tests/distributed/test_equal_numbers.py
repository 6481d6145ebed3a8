"""Two and three processes find the numbers of one: losses, gradient norms and weights, whatever the ranks get to do.

Float32. The same gradients are summed in another order, so that sums of some hundred numbers differ by rounding: some
1e-7 of their size. Weights are compared under plain SGD, whose step is that sum times the rate; Adam divides by the
size of a gradient, and makes a whole step of a rounding error where the gradient is nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.run import recipe, train
from tests.invariants.test_families import folder_of
from training_hub.backends import Given
from training_hub.errors import TrainingError
from training_hub.folders import damage
from training_hub.launch import run

CLOSE = 1e-6
SGD = {"name": "SGD", "lr": 0.1}
STEPS = {"global_batch_size": 8, "max_seq_len": 256, "steps": 4, "preflight": False}


def weights(folder: str | Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / f"{name}.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    # AdaLoRA may leave a matrix no rank.
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())


def same_steps(alone: Any, together: list[dict[str, Any]]) -> None:
    """Each step's loss, gradient norm, validation loss and counts are those of one process, on every rank."""
    for each in together:
        assert each.get("status") == "finished", each
        assert len(each["history"]) == len(alone.history) > 0
        for row, wanted in zip(each["history"], alone.history, strict=True):
            assert ("validation_loss" in row) == ("validation_loss" in wanted)
            for key in {"loss", "grad_norm", "validation_loss"} & row.keys():
                assert row[key] == pytest.approx(wanted[key], rel=CLOSE)
            for key in ("tokens", "trained_tokens", "samples", "epoch", "learning_rate"):
                assert row[key] == wanted[key]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("llama", {}),
    "one document after another": ("llama", {"data": {"packing": False}}),
    "qwen3, accumulated over small packs": ("qwen3", {"training": {**STEPS, "max_tokens_per_gpu": 256}}),
    "a mixture of experts": ("qwen3-moe", {}),
    "fewer samples than processes": ("llama", {"training": {**STEPS, "global_batch_size": 1}}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_numbers_of_one(case, two, tiny_model_folder, uneven_file, tmp_path):
    family, sections = CASES[case]
    model = folder_of(family, tiny_model_folder, tmp_path / "model")
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 1}, **sections}
    settings["data"] = {"validation_fraction": 0.2, **settings.get("data", {})}
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    together = two.train(model, uneven_file, tmp_path / "together", **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE
    assert together[0]["plan"]["processes"] == 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_three_processes_find_them_too(family, three, tiny_model_folder, uneven_file, tmp_path):
    model = folder_of(family, tiny_model_folder, tmp_path / "model")
    settings = {"training": {**STEPS, "global_batch_size": 5}, "optimizer": SGD}
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    together = three.train(model, uneven_file, tmp_path / "together", **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


ADAPTED: dict[str, dict[str, Any]] = {
    "osft": {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False}},
    "osft, gradients layer by layer": {
        "algorithm": "osft",
        "osft": {"unfreeze_rank_ratio": 0.5, "gradients": "layer", "cache": False},
    },
    "lora": {"algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}},
    "adalora": {"algorithm": "lora_sft", "lora": {"tuner": "adalora", "r": 2, "options": {"init_r": 4, "tfinal": 1}}},
    "schedule-free": {"optimizer": {"name": "AdamWScheduleFree", "lr": 1e-3}, "lr_scheduler": {"name": "constant"}},
    "unfrozen in turn": {"freezing": {"unfreeze_interval": 2}},
    "distillation": {"distillation": {"teacher": "another", "alpha": 0.5}},
}


@pytest.mark.parametrize("case", ADAPTED)
def test_whatever_trains_two_processes_find_the_numbers_of_one(case, two, tiny_model_folder, uneven_file, tmp_path):
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 1}, **ADAPTED[case]}
    settings["data"] = {"validation_fraction": 0.2}
    if case == "distillation":
        settings["distillation"] |= {"teacher": str(folder_of("qwen3", tiny_model_folder, tmp_path / "teacher"))}
    alone = train(tiny_model_folder, uneven_file, tmp_path / "alone", **settings)
    together = two.train(tiny_model_folder, uneven_file, tmp_path / "together", **settings)
    same_steps(alone, together)
    name = "adapter_model" if "lora" in case else "model"
    # Under Adam, see above, weights may differ by more; what they say of the validation rows may not.
    limit = 1e-4 if case == "schedule-free" else CLOSE
    assert apart(weights(alone.model_path, name), weights(together[0]["model_path"], name)) <= limit


def test_a_run_goes_on_in_any_number_of_processes(two, three, tiny_model_folder, uneven_file, tmp_path):
    settings = {
        "training": {"global_batch_size": 4, "epochs": 1, "preflight": False},
        "optimizer": SGD,
        "checkpoint": {"interval": 1},
    }
    unbroken = train(tiny_model_folder, uneven_file, tmp_path / "unbroken", **settings)
    output = tmp_path / "run"
    stopped = two.train(tiny_model_folder, uneven_file, output, {"signalled": 1, "step": 2}, **settings)
    assert [each["error"] for each in stopped] == ["Interrupted"] * 2, "a signal to one is a signal to all"
    assert stopped[0]["problems"] == stopped[1]["problems"], "and all stop after the same step"

    def stop(report) -> None:
        raise KeyError("the plug was pulled")

    with pytest.raises(TrainingError, match="the plug was pulled"):
        run(recipe(tiny_model_folder, uneven_file, output, **settings), Given(watchers=[stop]))
    resumed = three.train(tiny_model_folder, uneven_file, output, **settings)
    same_steps(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE
    again = two.train(tiny_model_folder, uneven_file, output, **settings)
    assert [each["status"] for each in again] == ["already finished"] * 2


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_is_named(two, tiny_model_folder, tmp_path):
    rows = [
        {
            "weight": 1e38 if number == 9 else 1,
            "messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": f"It {number}."}],
        }
        for number in range(16)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": {"shuffle": False}, "checkpoint": {"interval": 1}}
    ended = two.train(tiny_model_folder, data, tmp_path / "run", **settings)
    assert [each["error"] for each in ended] == ["TrainingError"] * 2
    for each in ended:
        assert "step 2: loss" in each["problems"][0] and "step-1" in each["problems"][0]
        assert "on rank " in each["problems"][0] and each["problems"][0].count("rows.jsonl line") == 1
        assert "rows.jsonl line 10" in each["problems"][0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_during_a_save_leaves_a_whole_one(rank, two, tiny_model_folder, chat_file, tmp_path):
    settings = {"checkpoint": {"interval": 2}, "training": {"global_batch_size": 2, "epochs": 1, "preflight": False}}
    order = {"signalled_in_save": rank, "step": 2}
    ended = two.train(tiny_model_folder, chat_file, tmp_path / "run", order, **settings)
    assert [each["error"] for each in ended] == ["Interrupted"] * 2
    folders = list((tmp_path / "run" / "checkpoints").iterdir())
    assert folders and not [line for folder in folders for line in damage(folder)]
    assert f"saved in {max(folders, key=lambda one: int(one.name[5:]))}" in ended[0]["problems"][0]


def test_ranks_that_read_other_data_do_not_train_together(two, tiny_model_folder, uneven_file, chat_file, tmp_path):
    ended = two.train(tiny_model_folder, [uneven_file, chat_file], tmp_path / "run", comm={"timeout_seconds": 60})
    assert [each["error"] for each in ended] == ["DataError"] * 2
    assert "rank 1 has read other data" in ended[0]["problems"][0]

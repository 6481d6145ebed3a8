"""Whole runs with optimizers of other packages, and with weights that stay or begin later: resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.run import final_weights, train
from training_hub.errors import RecipeError, TrainingError

EVERY_STEP = {"interval": 1, "keep_last": 2, "minutes": None}
CONSTANT = {"name": "constant"}


class StopAt:
    """A callback that ends the run after a step, as a crash in user code would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, report) -> None:
        if report.step == self.step:
            raise KeyError("the plug was pulled")


def both_ways(model, data, folder, /, **sections):
    """The run unbroken, and the same stopped after step 3 and gone on with."""
    sections = {"checkpoint": EVERY_STEP, "training": {"steps": 6}, **sections}
    unbroken = train(model, data, folder / "unbroken", **sections)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(model, data, folder / "run", [StopAt(3)], **sections)
    return unbroken, train(model, data, folder / "run", **sections)


def assert_same(first, second):
    one, other = final_weights(first), final_weights(second)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["loss"] for row in first.history] == [row["loss"] for row in second.history]


@pytest.mark.parametrize("name", ["Lion", "Muon", "AdamWScheduleFree", "GaLoreAdamW", "AdamW8bit"])
def test_a_run_is_resumed_bit_for_bit_and_planned_as_it_is(tiny_model_folder, chat_file, tmp_path, name):
    optimizer = {"name": name, "lr": 1e-3, **({"galore_rank": 4, "galore_interval": 2} if name[0] == "G" else {})}
    runs = both_ways(
        tiny_model_folder,
        chat_file,
        tmp_path,
        model={"dtype": "bfloat16"},
        optimizer=optimizer,
        lr_scheduler=CONSTANT,
        data={"validation": str(chat_file)},
        evaluation={"interval": 2},
    )
    assert_same(*runs)
    losses = [row["validation_loss"] for row in runs[0].history if row.get("validation_loss")]
    assert losses[-1] < losses[0] < runs[0].metrics["validation_loss_before"]
    kept = load_file(runs[0].checkpoints[-1] / "optimizer.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values() if tensor.dim())
    assert runs[0].plan["memory_gib"]["optimizer"] * 2**30 == pytest.approx(size)


def test_a_schedule_free_run_ends_with_its_average_also_where_that_is_not_the_last_step(
    tiny_model_folder, chat_file, tmp_path
):
    run = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "run",
        optimizer={"name": "AdamWScheduleFree"},
        lr_scheduler=CONSTANT,
        training={"steps": 4},
        checkpoint={**EVERY_STEP, "keep_best": True},
        data={"validation": str(chat_file)},
        evaluation={"interval": 1},
    )
    final, last = final_weights(run), load_file(run.checkpoints[-1] / "model.safetensors")
    assert any(not torch.equal(final[name], last[name]) for name in final), "checkpoints hold what goes on moving"
    kept = load_file(run.checkpoints[-1] / "optimizer.safetensors")
    for name, weight in last.items():
        average = weight.lerp(kept[f"{name}/z"], 1 - 1 / 0.9)
        torch.testing.assert_close(final[name], average, rtol=0, atol=1e-6)


def test_schedule_free_wants_a_constant_rate(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(ValueError, match=r"Write lr_scheduler\.name: constant"):
        train(tiny_model_folder, chat_file, tmp_path / "run", optimizer={"name": "AdamWScheduleFree"})


def test_lion_keeps_within_the_directions_that_osft_leaves_and_muon_is_refused(tiny_model_folder, chat_file, tmp_path):
    osft = {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False}, "training": {"steps": 3}}
    lion = {"name": "Lion", "weight_decay": 0.1}
    run = train(tiny_model_folder, chat_file, tmp_path / "run", optimizer=lion, **osft)
    assert all(row["osft_leak"] <= 1e-6 for row in run.history)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    with pytest.raises(ValueError, match="OSFT projects after each step"):
        train(tiny_model_folder, chat_file, tmp_path / "muon", optimizer={"name": "Muon"}, **osft)


def test_what_is_frozen_stays_and_the_rest_moves(tiny_model_folder, chat_file, tmp_path):
    freezing = {"blocks": 1, "embeddings": True, "weights": ["layers.1.*.q_proj", "norm"]}
    run = train(tiny_model_folder, chat_file, tmp_path / "run", freezing=freezing, training={"steps": 3})
    before, after = load_file(tiny_model_folder / "model.safetensors"), final_weights(run)
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    expected = {
        name
        for name in before
        if ".layers.0." in name or name in ("model.embed_tokens.weight", "model.norm.weight") or "q_proj" in name
    }
    assert stayed == expected
    assert run.plan["trained_parameters"] == sum(t.numel() for name, t in before.items() if name not in expected)


def test_weights_unfreeze_from_the_top_down_and_a_run_goes_on_bit_for_bit(tiny_model_folder, chat_file, tmp_path):
    # Block 1 from the first step, block 0 from step 3, the embeddings from step 5. With bfloat16 there are masters.
    freezing = {"unfreeze_interval": 2}
    runs = both_ways(tiny_model_folder, chat_file, tmp_path, freezing=freezing, model={"dtype": "bfloat16"})
    assert_same(*runs)
    step_3 = train(
        tiny_model_folder, chat_file, tmp_path / "three", freezing=freezing, checkpoint=EVERY_STEP,
        training={"steps": 3}, lr_scheduler=CONSTANT,
    )  # fmt: skip
    moved = {}
    for step, folder in zip((2, 3), step_3.checkpoints, strict=True):
        kept = load_file(folder / "optimizer.safetensors")
        moved[step] = {name.split("/")[0] for name in kept}
    assert not any(".layers.0." in name for name in moved[2]), "no optimizer state before its turn"
    assert any(".layers.0." in name for name in moved[3])
    assert "model.embed_tokens.weight" not in moved[3]
    assert "model.embed_tokens.weight/exp_avg" in load_file(runs[0].checkpoints[-1] / "optimizer.safetensors")
    assert runs[0].plan["frozen_at_first"] > 0


def test_weights_that_unfreeze_under_sgd_begin_with_the_momentum_of_a_first_step(
    tiny_model_folder, chat_file, tmp_path
):
    settings = {"freezing": {"unfreeze_interval": 1}, "lr_scheduler": CONSTANT, "checkpoint": EVERY_STEP}
    moved = train(
        tiny_model_folder, chat_file, tmp_path / "moved", training={"steps": 2},
        optimizer={"name": "SGD", "lr": 0.01, "momentum": 0.9}, **settings,
    )  # fmt: skip
    plain = train(
        tiny_model_folder, chat_file, tmp_path / "plain", training={"steps": 2},
        optimizer={"name": "SGD", "lr": 0.01}, **settings,
    )  # fmt: skip
    found, wanted = (load_file(run.checkpoints[-1] / "model.safetensors") for run in (moved, plain))
    # Block 0 moves in step 2 for the first time, block 1 for the second, with what is left of its first step.
    same = {name for name in wanted if torch.equal(found[name], wanted[name])}
    assert {name for name in wanted if ".layers.0." in name} <= same
    assert not any(".layers.1." in name for name in same)


@pytest.mark.parametrize(
    ("freezing", "said"),
    [
        ({"blocks": 3}, r"freezing\.blocks: found 3; the model has 2"),
        ({"weights": ["q_porj"]}, r"freezing\.weights: 'q_porj' is in none of the names"),
        ({"weights": ["*"]}, "nothing is left that trains"),
        ({"unfreeze_interval": 2, "unfrozen_blocks": 2}, r"Write freezing\.unfrozen_blocks: 1"),
        ({"unfrozen_blocks": 2}, r"freezing\.unfrozen_blocks: 2 would change nothing"),
    ],
)
def test_freezing_that_matches_nothing_or_everything_is_refused(tiny_model_folder, chat_file, tmp_path, freezing, said):
    with pytest.raises((RecipeError, ValueError), match=said):
        train(tiny_model_folder, chat_file, tmp_path / "run", freezing=freezing)


def test_layers_are_named_part_by_part():
    from training_hub.backends.shared.freezing import is_part

    assert is_part("layers.1", "model.layers.1.mlp.weight")
    assert not is_part("layers.1", "model.layers.10.mlp.weight")
    assert is_part("layers.*.mlp", "model.layers.10.mlp.weight")

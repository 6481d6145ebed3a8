"""Whole runs with OSFT: packed, accumulated, broken off and gone on with, exported, carried over tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.backends.torch_engine.osft import dump
from tests.invariants.run import final_weights, recipe
from tests.invariants.run import train as run_of
from tests.invariants.test_resume import EVERY_STEP, StopAt, held_in_step_4, same_weights
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.errors import CheckpointError, RecipeError, TrainingError
from training_hub.frontends.cli import main
from training_hub.launch import run
from training_hub.monitoring.jsonl import read_metrics
from training_hub.types import TrainResult

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def asked(**sections: Any) -> dict[str, Any]:
    osft = {"unfreeze_rank_ratio": 0.3, "cache": False, **sections.pop("osft", {})}
    return {"algorithm": "osft", "osft": osft, **sections}


def train(model: Path, data: Path, output: Path, watchers: Any = (), /, **sections: Any) -> TrainResult:
    return run_of(model, data, output, watchers, **asked(**sections))


@pytest.fixture(scope="module")
def plain(tiny_model_folder, chat_file, tmp_path_factory) -> TrainResult:
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("osft") / "run", checkpoint=EVERY_STEP)


def test_the_loss_falls_and_every_step_says_its_leak_and_drift(plain):
    losses = [row["loss"] for row in plain.history]
    assert losses[-1] < losses[0]
    assert all(0 < row["osft_leak"] <= 1e-6 for row in plain.history)
    drifts = [row["osft_drift"] for row in plain.history]
    assert drifts == sorted(drifts)
    assert 0 < drifts[0] < drifts[-1] < 0.1
    assert plain.metrics["osft_leak"] == plain.history[-1]["osft_leak"]


def test_what_the_final_model_learned_lies_in_the_low_directions_of_its_start(plain, tiny_model_folder):
    before, after = load_file(tiny_model_folder / "model.safetensors"), final_weights(plain)
    for name, start in before.items():
        moved = after[name].double() - start.double()
        assert moved.norm() > 0, name
        if any(part in name for part in MATRICES):
            u, _, v = torch.linalg.svd(start.double(), full_matrices=False)
            kept = int(min(start.shape) * 0.7)
            # float32 weights of about 0.1, rounded in each of eight steps.
            for inside in (u[:, :kept].T @ moved, moved @ v[:kept].T):
                assert inside.norm() < 1e-3 * moved.norm()


def test_the_final_model_is_an_ordinary_hugging_face_model(plain, tiny_model_folder):
    loaded = AutoModelForCausalLM.from_pretrained(plain.model_path)
    assert final_weights(plain).keys() == load_file(tiny_model_folder / "model.safetensors").keys()
    assert not list(plain.model_path.glob("*osft*"))
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(plain.model_path)(ids).logits)


@pytest.mark.parametrize(
    "changed",
    [{"data": {"packing": False}}, {"training": {"max_seq_len": 64, "max_tokens_per_gpu": 64}}],
    ids=["unpacked", "many small packs"],
)
@pytest.mark.parametrize("gradients", ["step", "layer"])
def test_packing_and_accumulation_change_rounding_only(
    changed, gradients, plain, tiny_model_folder, chat_file, tmp_path
):
    other = train(tiny_model_folder, chat_file, tmp_path / "run", osft={"gradients": gradients}, **changed)
    for mine, theirs in zip(other.history, plain.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "layer by layer": {"osft": {"gradients": "layer"}, "model": {"dtype": "bfloat16"}},
    "core": {"osft": {"form": "core"}},
    "energy": {"osft": {"unfreeze_rank_ratio": None, "energy": 0.8}},
    "split and decayed": {"osft": {"others": "freeze"}, "optimizer": {"weight_decay": 0.1}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_fails_goes_on_to_the_same_bits(name, tiny_model_folder, chat_file, tmp_path):
    changed = VARIANTS[name]
    whole = train(tiny_model_folder, chat_file, tmp_path / "whole", **changed)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(4)], checkpoint=EVERY_STEP, **changed)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP, **changed)
    assert same_weights(resumed, whole)
    keys = ("loss", "grad_norm", "osft_leak", "osft_drift")
    assert [[row[key] for key in keys] for row in resumed.history] == [
        [row[key] for key in keys] for row in whole.history
    ]


def test_kill_9_loses_nothing_that_was_saved(plain, tiny_model_folder, chat_file, tmp_path):
    wanted = recipe(tiny_model_folder, chat_file, tmp_path / "run", **asked(checkpoint=EVERY_STEP))
    held_in_step_4(wanted, lambda process: process.kill())
    assert same_weights(run(wanted), plain)


def test_a_checkpoint_of_sft_in_the_folder_is_refused(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(TrainingError):
        run_of(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(4)], checkpoint=EVERY_STEP)
    with pytest.raises(CheckpointError, match="algorithm: was 'sft', now 'osft'"):
        train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP)


def test_the_best_step_can_be_the_final_model(tiny_model_folder, chat_file, tmp_path):
    result = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "run",
        data={"validation_fraction": 0.2},
        evaluation={"interval": 2},
        checkpoint={"keep_best": True, "interval": 2, "keep_last": None},
    )
    best = int(result.metrics["best_step"])
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{best}" / "model.safetensors")
    for name, tensor in final_weights(result).items():
        assert torch.equal(tensor, saved[name])


def test_ratio_0_leaves_the_matrices_and_ratio_1_is_sft(plain, tiny_model_folder, chat_file, tmp_path):
    before = load_file(tiny_model_folder / "model.safetensors")
    frozen = train(tiny_model_folder, chat_file, tmp_path / "0", osft={"unfreeze_rank_ratio": 0.0})
    for name, tensor in final_weights(frozen).items():
        assert torch.equal(tensor, before[name]) == any(part in name for part in MATRICES), name
    whole = train(tiny_model_folder, chat_file, tmp_path / "1", osft={"unfreeze_rank_ratio": 1.0})
    assert same_weights(whole, run_of(tiny_model_folder, chat_file, tmp_path / "sft"))


def test_freezing_the_others_leaves_them_as_they_were(tiny_model_folder, chat_file, tmp_path):
    before = load_file(tiny_model_folder / "model.safetensors")
    result = train(tiny_model_folder, chat_file, tmp_path / "run", osft={"others": "freeze"})
    for name, tensor in final_weights(result).items():
        assert torch.equal(tensor, before[name]) != any(part in name for part in MATRICES), name


def test_a_table_says_what_is_protected_trained_and_frozen(tiny_model_folder, chat_file, tmp_path, capsys):
    train(tiny_model_folder, chat_file, tmp_path / "run", monitoring={"console": "plain"})
    said = capsys.readouterr()
    text = said.out + said.err
    assert "osft: protected                 18,432 numbers" in text
    assert "2 self_attn.q_proj" in text
    assert "osft: trained in full" in text
    assert "osft: frozen                         0 numbers" in text


def test_a_second_task_protects_what_the_first_did_and_more(tiny_model_folder, chat_file, tmp_path):
    first = train(tiny_model_folder, chat_file, tmp_path / "1", osft={"carry": True})
    state = load_file(first.model_path / "osft_state.safetensors")
    assert AutoModelForCausalLM.from_pretrained(first.model_path) is not None
    second = train(first.model_path, chat_file, tmp_path / "2", osft={"carry": True})
    later = load_file(second.model_path / "osft_state.safetensors")
    before, after = final_weights(first), final_weights(second)
    for name in (name for name in before if any(part in name for part in MATRICES)):
        free, narrower = state[f"{name}.right"].double(), later[f"{name}.right"].double()
        side = min(before[name].shape)
        assert len(free) == side - int(side * 0.7)
        assert len(narrower) == len(free) - max(0, int(len(free) * 0.7 + 1e-9))
        moved = after[name].double() - before[name].double()
        moved = moved.T if moved.shape[0] < moved.shape[1] else moved
        for basis in (free, narrower):
            # As far as float32 weights can say: nothing outside what the first task, and this one, left free.
            assert (moved - moved @ basis.T @ basis).norm() < 1e-3 * moved.norm()


def test_a_state_of_other_targets_is_refused(tiny_model_folder, chat_file, tmp_path):
    first = train(tiny_model_folder, chat_file, tmp_path / "1", osft={"carry": True, "targets": ["o_proj"]})
    with pytest.raises(RecipeError, match=r"osft\.carry: .* protects other weights"):
        train(first.model_path, chat_file, tmp_path / "2", osft={"carry": True})


def test_decompositions_are_kept_and_a_damaged_one_is_made_again(tiny_model_folder, chat_file, tmp_path):
    kept = {"osft": {"cache": True}, "data": {"cache": True, "cache_dir": str(tmp_path / "cache")}}
    once = train(tiny_model_folder, chat_file, tmp_path / "1", **kept)
    files = sorted((tmp_path / "cache" / "osft").rglob("split.safetensors"))
    assert len(files) == 14
    times = [file.stat().st_mtime_ns for file in files]
    content = bytearray(files[0].read_bytes())
    content[-3] ^= 4
    files[0].write_bytes(content)
    again = train(tiny_model_folder, chat_file, tmp_path / "2", **kept)
    assert same_weights(once, again)
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:], "found, not made again"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"osft": {"unfreeze_rank_ratio": None}}, r"osft\.unfreeze_rank_ratio: not given.*Write"),
        ({"osft": {"energy": 0.5}}, "one excludes the other"),
        ({"optimizer": {"name": "Adafactor"}}, r"Adafactor makes its steps.*AdamW"),
        ({"osft": {"unfreeze_rank_ratio": 1.5}}, "unfreeze_rank_ratio"),
    ],
)
def test_settings_at_odds_are_refused(wrong, message, tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe(tiny_model_folder, chat_file, tmp_path / "run", **asked(**wrong))


def test_osft_settings_without_osft_are_refused(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(ValueError, match=r"osft\.form: core would change nothing while algorithm is sft"):
        recipe(tiny_model_folder, chat_file, tmp_path / "run", osft={"form": "core"})


def test_the_command_line_follows_the_reference(test_data, tiny_model_folder, tmp_path):
    folder = dump.dump_folder(test_data, "float64_5steps")
    dump.model_of(folder).save_pretrained(tmp_path / "model")
    rows = "".join(json.dumps(row) + "\n" for row in dump.rows(folder))
    (tmp_path / "rows.jsonl").write_text(rows)
    code = main([
        "osft", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"),
        "--output", str(tmp_path / "out"), "--model.tokenizer", str(tiny_model_folder), "--model.dtype=float64",
        "--model.save_dtype=float64", "--data.format=tokens", "--data.shuffle=false", "--data.cache=false",
        "--osft.unfreeze_rank_ratio=0.3", "--osft.cache=false", "--batch-size=4", "--epochs=1", "--learning-rate=0.001",
        "--lr_scheduler.name=constant", "--monitoring.console=off", "--training.preflight=false",
    ])  # fmt: skip
    assert code == 0
    # The dump takes its softmax in float32, we take ours in float64: 1e-8 of a gradient, which Adam hands on. So the
    # run is compared with the loop that reproduces the dump to 1e-12 (test_reference), given an attention in float64.
    model, losses = dump.model_of(folder), []
    model.set_attn_implementation("sdpa")
    optimizer = dump.optimizer_of(folder, model)
    for batch in dump.batches(folder):
        ids, labels = (batch[key].reshape(dump.DOCUMENTS, -1) for key in ("input_ids", "labels"))
        losses.append(dump.step(model, optimizer, {"input_ids": ids}, labels))
    rows_of_run = read_metrics(tmp_path / "out" / "metrics.jsonl")
    for row, (loss, norm), said in zip(rows_of_run, losses, dump.steps(folder), strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-10)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-10)
        assert row["loss"] == pytest.approx(said["loss"], rel=1e-9)
        assert row["grad_norm"] == pytest.approx(said["grad_norm"], rel=1e-7)
    final, wanted = load_file(tmp_path / "out" / "final" / "model.safetensors"), load_file(folder / "final.safetensors")
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, model.get_parameter(name).detach(), rtol=0, atol=1e-12)
    # Where a gradient is nearly 0, its rounding decides a step of up to the learning rate: a few numbers in a thousand.
    apart = sum(int(((tensor - wanted[name]).abs() > 1e-8).sum()) for name, tensor in final.items())
    assert apart < 1e-3 * sum(tensor.numel() for tensor in final.values())


@pytest.mark.parametrize("changed", [{}, {"osft": {"form": "core"}}, {"model": {"dtype": "bfloat16"}}])
def test_the_plan_counts_what_trains_and_what_a_checkpoint_holds(changed, tiny_model_folder, chat_file, tmp_path):
    result = train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP, **changed)
    folder = result.checkpoints[-1]
    # Without the marks that tell weights as they came, one number for each.
    saved = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.endswith(".osft.start")}
    matrices = {name for name in saved if ".osft." not in name and any(part in name for part in MATRICES)}
    moved = {name: tensor for name, tensor in saved.items() if ".osft.split." not in name and name not in matrices}
    assert result.plan["trained_parameters"] == sum(tensor.numel() for tensor in moved.values())
    attached = ADAPTATIONS["osft"](recipe(tiny_model_folder, chat_file, tmp_path / "other", **asked(**changed)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    attached.attach(model)
    rest = saved.keys() - moved.keys()
    assert attached.holdings().saved == sum(saved[name].numel() for name in rest)
    assert attached.holdings().claimed == matrices

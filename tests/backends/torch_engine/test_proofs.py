"""Each proof holds on a sound run, fails when what it is about is broken, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.invariants.run import final_weights, recipe, train
from training_hub.backends import Given
from training_hub.backends.shared.proofs import refuse
from training_hub.backends.torch_engine import engine as engines
from training_hub.backends.torch_engine import proofs
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.tensors import Term
from training_hub.data.agreement import agreement
from training_hub.data.store import TokenStore
from training_hub.errors import TrainingError
from training_hub.frontends.cli import main
from training_hub.monitoring.console import SilentConsole
from training_hub.types import Proof, Sample


@pytest.fixture
def subject(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> proofs.Subject:
    """All that the proofs of a small float32 run are about."""
    made = recipe(tiny_model_folder, chat_file, tmp_path)
    console, device, dtype = SilentConsole(), torch.device("cpu"), torch.float32
    materials = engines.load_materials(made, Given(), console)
    loaded = load_model(made, device, dtype)
    run = engines.assemble(made, loaded, materials, device, dtype, console)
    return proofs.Subject(
        run=run,
        dtype=dtype,
        save_dtype=dtype,
        agreement=lambda: agreement(made.data, run.feed.store, materials.tokenizer, 32),
        stop_ids=engines.stop_ids(materials),
        ending_ids=tuple(materials.tokenizer.special_ids.values()),
        save=lambda place: engines.write_model(run, loaded, materials, place),
        scratch=tmp_path,
        predicted={"activations": None},
        thorough=True,
    )


def by_name(found: list[Proof]) -> dict[str, Proof]:
    return {each.name: each for each in found}


def failed(found: list[Proof]) -> list[str]:
    return [each.name for each in found if each.status == "fails"]


def with_samples(subject: proofs.Subject, change: Any) -> proofs.Subject:
    """The same with other samples in the store."""
    store = subject.run.feed.store
    subject.run.feed.store = TokenStore.from_samples([change(store[index]) for index in range(len(store))])
    return subject


def test_all_hold_on_a_sound_run_and_leave_it_as_it_was(subject: proofs.Subject):
    model = subject.run.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = proofs.prove(subject)
    assert {each.status for each in found if each.name != "memory is as planned"} == {"holds"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert subject.run.updater.state() == {}
    assert list(subject.scratch.iterdir()) == []


def test_a_mask_that_is_shifted_by_three_tokens_is_found(
    subject: proofs.Subject, tiny_model_folder: Path, chat_file: Path
):
    def shifted(sample: Sample) -> Sample:
        weights = np.roll(sample.weights, -3)
        return Sample(np.array(sample.ids), weights, sample.origin)

    broken = with_samples(subject, shifted)
    tokenizer = engines.load_materials(broken.run.recipe, Given(), SilentConsole()).tokenizer
    found = agreement(broken.run.recipe.data, broken.run.feed.store, tokenizer, 32)
    assert found.rows == len(found.problems) == 32
    assert "chat.jsonl line 1" in found.problems[0]
    broken = dataclasses.replace(broken, agreement=lambda: found)
    assert failed(proofs.prove(broken)) == ["trained text is what the rows say"]


def test_rows_that_were_not_cut_are_compared_where_others_may_have_been(subject: proofs.Subject):
    run = subject.run
    tokenizer = engines.load_materials(run.recipe, Given(), SilentConsole()).tokenizer
    cuts = run.recipe.data.model_copy(update={"overlong": "truncate"})
    longest = int(run.feed.store.lengths.max())
    for limit, rows in ((None, 0), (longest + 1, 32), (int(run.feed.store.lengths.min()), 0)):
        found = agreement(cuts, run.feed.store, tokenizer, 32, longest=limit)
        assert (found.rows, found.problems) == (rows, ())


def test_a_trained_user_turn_is_found(subject: proofs.Subject):
    everything = with_samples(subject, lambda one: Sample(np.array(one.ids), np.ones(len(one), np.float32), one.origin))
    tokenizer = engines.load_materials(everything.run.recipe, Given(), SilentConsole()).tokenizer
    found = agreement(everything.run.recipe.data, everything.run.feed.store, tokenizer, 8)
    assert len(found.problems) == 8
    assert "not to be trained (user)" in found.problems[1]


def test_samples_without_a_stop_token_are_told_and_stop_nothing(subject: proofs.Subject):
    def cut(sample: Sample) -> Sample:
        weights = np.array(sample.weights)
        weights[np.isin(sample.ids, subject.ending_ids)] = 0
        return Sample(np.array(sample.ids), weights, sample.origin)

    found = by_name(proofs.prove(with_samples(subject, cut)))["samples end in a trained stop token"]
    assert found.status == "fallback"
    assert "hardly learn to stop" in found.remedy


def test_generation_that_stops_elsewhere_is_found(subject: proofs.Subject):
    subject.run.model.generation_config.eos_token_id = 5
    found = proofs.prove(dataclasses.replace(subject, stop_ids=[6]))
    assert failed(found) == ["generation stops at what was trained"]


def test_weights_that_are_not_finite_are_found_and_named(subject: proofs.Subject):
    with torch.no_grad():
        subject.run.model.lm_head.weight[3, :7] = float("nan")
    found = proofs.prove(subject)
    assert failed(found) == ["every weight is a finite number"]
    with pytest.raises(TrainingError, match=r"lm_head\.weight holds 7 numbers"):
        refuse(found)


def test_a_loss_that_forgets_the_weight_of_tokens_is_found(subject: proofs.Subject):
    right = subject.run.objective
    subject.run.objective = lambda model, pack: Term(right(model, pack).total * 1.01)
    assert failed(proofs.prove(subject)) == ["fast loss is the plain one"]


def test_a_loss_whose_gradient_alone_is_wrong_is_found(subject: proofs.Subject):
    right = subject.run.objective

    def half(model: Any, pack: Any) -> Term:
        total = right(model, pack).total
        return Term(total * 0.5 + (total * 0.5).detach())

    subject.run.objective = half
    assert failed(proofs.prove(subject)) == ["fast loss is the plain one"]


def test_a_loss_that_depends_on_its_neighbours_is_found(subject: proofs.Subject):
    right = subject.run.objective
    subject.run.objective = lambda model, pack: Term(right(model, pack).total * len(pack.lengths) ** 0.1)
    assert failed(proofs.prove(subject)) == ["packed samples are as if alone", "accumulation leaves loss and gradient"]


def test_weights_that_are_too_coarse_to_move_are_found(subject: proofs.Subject):
    masters = subject.run.updater.masters
    for name, weight in masters.weights.items():
        masters.weights[name] = (weight.detach() + 100.0).requires_grad_()  # half a unit in its last place is 4e-6
        masters.weights[name].grad = torch.ones_like(weight)
    assert proofs._moved(subject.run).status == "fails"


def test_a_folder_that_does_not_hold_the_model_is_found(subject: proofs.Subject):
    saved = subject.save
    found = proofs.prove(dataclasses.replace(subject, save=lambda place: saved(place) + 1.0))
    assert failed(found) == ["saved and loaded gives the same logits"]

    def refused(place: Path) -> float:
        raise OSError("no space left on device")

    found = proofs.prove(dataclasses.replace(subject, save=refused))
    assert "no space left" in by_name(found)["saved and loaded gives the same logits"].remedy


def test_a_run_ends_in_the_same_bits_with_and_without_proofs(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    with_proofs = train(tiny_model_folder, chat_file, tmp_path / "with")
    without = train(tiny_model_folder, chat_file, tmp_path / "without", training={"preflight": False})
    one, other = final_weights(with_proofs), final_weights(without)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert json.loads((tmp_path / "with" / "preflight.json").read_text())["holds"] is True
    assert not (tmp_path / "without" / "preflight.json").exists()
    assert [row["loss"] for row in with_proofs.history] == [row["loss"] for row in without.history]


def test_the_command_prints_a_table_or_json_and_trains_nothing(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["check", f"--model={tiny_model_folder}", f"--data={chat_file}", "--data.cache=false", "--max-seq-len=256"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "every proof holds" in shown
    assert shown.count("\nok ") >= 8
    capsys.readouterr()
    began = time.perf_counter()
    assert main([*words, "--json", f"--output={tmp_path / 'run'}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["holds"] is True
    assert 0 < printed["seconds"] < time.perf_counter() - began
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]
    kept = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert kept["proofs"] == printed["proofs"]


def test_the_command_says_what_fails_with_the_code_of_a_failed_run(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"] *= 1e37  # finite, but its gradient is not
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    words = [f"--model={tmp_path / 'model'}", f"--data={chat_file}", "--data.cache=false", "--max-seq-len=256"]
    assert main(["check", *words]) == 6
    assert "FAIL  fast loss is the plain one" in capsys.readouterr().out
    assert main(["sft", *words, f"--output={tmp_path / 'run'}"]) == 6
    assert "preflight: fast loss is the plain one: found" in capsys.readouterr().err

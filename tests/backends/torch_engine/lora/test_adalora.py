"""AdaLoRA: the steps of PEFT's own loop, ranks taken until the budget is met, broken off and gone on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.backends.torch_engine.lora.test_runs import adapter_of, asked, logits_in_peft, same_adapters, train
from tests.backends.torch_engine.tiny_models import random_pack
from tests.invariants.run import recipe
from tests.invariants.test_resume import EVERY_STEP, StopAt
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.adaptations.lora.adaptation import seeded
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.optim import Masters, Updater
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.errors import RecipeError, TrainingError

peft = pytest.importorskip("peft")

RATE, STEPS = 0.02, 8
SHARED: dict[str, Any] = {"tuner": "adalora", "r": 2, "options": {"init_r": 4, "tinit": 2, "tfinal": 2}}


def test_steps_are_those_of_pefts_own_loop(tiny_model_folder, tmp_path):
    pack = to_device(random_pack((40,), trained=2.0), "cpu")
    pack.weights[0, 1:] = 1
    wanted = recipe(tiny_model_folder, tmp_path / "none", tmp_path / "run", **asked(lora=SHARED))
    adaptation = ADAPTATIONS["lora"](wanted)
    model = adaptation.attach(load_model(wanted, torch.device("cpu"), torch.float32).model)
    adaptation.expect_steps(STEPS)
    moved = Updater(Masters(model.named_parameters(), adaptation), wanted.optimizer, 0)
    for _ in range(STEPS):
        (CrossEntropy()(model, pack).total / 39).backward()
        moved.clip()
        adaptation.before_step(RATE)
        moved.step(RATE)
        adaptation.after_step()

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_r=2, init_r=4, tinit=2, tfinal=2, total_step=STEPS, target_modules="all-linear"
    )
    with seeded(wanted.seed):
        theirs = peft.get_peft_model(plain, config)
    chosen = wanted.optimizer
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=RATE, betas=(chosen.beta1, chosen.beta2), weight_decay=0
    )
    for step in range(1, STEPS + 1):
        theirs(input_ids=pack.ids, labels=pack.ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()

    ours = {name: p for name, p in model.named_parameters() if "lora_" in name}
    others = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if "lora_" in name}
    assert ours.keys() == others.keys()
    for name, parameter in ours.items():
        # Gradients of the same float32 numbers, added up in another order, through eight steps of AdamW.
        torch.testing.assert_close(parameter, others[name], rtol=1e-3, atol=1e-5)
    ranks = [int(p.count_nonzero()) for name, p in ours.items() if "lora_E" in name]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1, "every matrix kept the same rank"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def shared(request, tiny_model_folder, chat_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("adalora") / "run"
    settings = {
        "lora": {**SHARED, "alpha": 64},
        "model": {"dtype": request.param},
        "optimizer": {"lr": RATE},
        "training": {"epochs": 2},
        "checkpoint": EVERY_STEP,
    }
    return train(tiny_model_folder, chat_file, output, **settings), settings


def test_ranks_fall_to_the_budget_and_the_folder_is_what_was_trained(shared, tiny_model_folder):
    result, _ = shared
    ranks = [row["adapter_mean_rank"] for row in result.history]
    assert ranks[0] > 3 and ranks[-1] == 2
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.05
    written = adapter_of(result)
    kept = [tensor.shape[0] for name, tensor in written.items() if "lora_E" in name]
    assert sum(kept) == 2 * 14, "ranks that were taken are not written"
    before = AutoModelForCausalLM.from_pretrained(tiny_model_folder)(torch.arange(3, 60)[None]).logits
    assert (logits_in_peft(result, tiny_model_folder) - before).abs().max() > 1e-3


@pytest.mark.parametrize("module", ["lm_head", "model.norm"])
def test_whole_modules_learn_beside_ranks_in_the_format_of_the_model(module, tiny_model_folder, chat_file, tmp_path):
    lora = {**SHARED, "modules_to_save": [module]}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", lora=lora, model={"dtype": "bfloat16"})
    came = AutoModelForCausalLM.from_pretrained(tiny_model_folder).get_submodule(module).weight
    moved = adapter_of(result)[f"base_model.model.{module}.weight"] - came
    assert 1e-4 < moved.detach().abs().max() < 0.1, "a copy that begins as the module and learns"
    assert logits_in_peft(result, tiny_model_folder, torch.bfloat16).isfinite().all()


def test_a_run_that_fails_goes_on_to_the_same_bits(shared, tiny_model_folder, chat_file, tmp_path):
    whole, settings = shared
    # Once while ranks are being taken, once when they have been.
    for step in (7, 15) if settings["model"]["dtype"] == "float32" else (7,):
        with pytest.raises(TrainingError, match="the plug was pulled"):
            train(tiny_model_folder, chat_file, tmp_path / f"{step}", [StopAt(step)], **settings)
        assert same_adapters(train(tiny_model_folder, chat_file, tmp_path / f"{step}", **settings), whole)


def test_an_adapter_is_not_gone_on_with_once_its_ranks_are_shared_out(shared, tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(RecipeError, match="is an AdaLoRA adapter, whose ranks have been shared out"):
        train(tiny_model_folder, chat_file, tmp_path / "run", lora={"adapter": str(shared[0].model_path)})


WRONG = {
    "no steps left": ({"options": {"tinit": 5, "tfinal": 4}}, r"tinit 5 and tfinal 4 leave none of the run's 8 steps"),
    "nothing to take": ({"r": 4, "options": {"init_r": 4}}, r"init_r 4; allowed: more than the 4 .* init_r: 6"),
    "of the run": ({"options": {"total_step": 10}}, r"total_step is the run's to say"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_shared_out_is_told_before_weights_are_read(name, tiny_model_folder, chat_file, tmp_path):
    wrong, message = WRONG[name]
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model_folder.iterdir():
        content = file.read_bytes()
        half = len(content) // 2
        (model / file.name).write_bytes(content[:half] + b"\0" * half if file.suffix == ".safetensors" else content)
    with pytest.raises(RecipeError, match=message):
        train(model, chat_file, tmp_path / "run", lora={"tuner": "adalora", **wrong})
